"""How artifacts are run, in the words of model cards: shared by the formats that the same runtimes read."""

from __future__ import annotations

from quantize.formats.format import Way

PYTHON_TRANSFORMERS = """\
from transformers import {class}, AutoTokenizer%s

tokenizer = AutoTokenizer.from_pretrained(".")
%s
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=16)[0]))
"""
PLAIN = ("", 'model = {class}.from_pretrained(".")')
DEQUANTIZED = (
    ", CompressedTensorsConfig",
    "how = CompressedTensorsConfig(dequantize=True)\n"
    'model = {class}.from_pretrained(".", quantization_config=how)',
)  # fmt: skip
SERVE = Way("quantize", "sh", "quantize serve .")
VLLM = Way("vLLM", "sh", "vllm serve .")
# RFC 30136 and 39583 of vllm-project/vllm: compressed-tensors stays, AWQ's and GPTQ's own files are legacy.
FOR_VLLM = "vLLM calls this format legacy; `format: compressed-tensors, scheme: W4A16` writes the same codes for it"
SGLANG = Way("SGLang", "sh", "python -m sglang.launch_server --model-path .")


def in_transformers(helper: str, *, dequantized: bool = False) -> Way:
    """transformers with the library that reads the format. dequantized: it must be told to dequantize as it reads."""
    code = PYTHON_TRANSFORMERS % (DEQUANTIZED if dequantized else PLAIN)
    return Way(f"transformers with {helper}", "python", code)
