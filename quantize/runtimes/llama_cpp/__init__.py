"""llama.cpp by llama-cpp-python: convert, quantize, load, run."""
