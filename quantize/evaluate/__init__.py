"""Measures what quantization cost: an artifact against its full-precision source, in the artifact's real runtime.

text (held-out windows of token ids) -> runtimes (next-token log-probabilities, greedy answers) -> baseline and metrics
(perplexity, KL divergence, agreement), golden (prompts and graders) -> decision (figures against limits). Nothing here
knows of the store; every heavy import is inside a function.
"""
