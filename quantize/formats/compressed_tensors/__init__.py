"""compressed-tensors: integers, FP8 and FP4 as llm-compressor writes them and vLLM and SGLang read them."""
