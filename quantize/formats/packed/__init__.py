"""What AWQ and GPTQ are alike in: packed integers in a Hugging Face folder. No format of its own."""
