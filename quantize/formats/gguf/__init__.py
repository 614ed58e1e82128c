"""GGUF, by llama.cpp: its types, importance matrices, the check of a file."""
