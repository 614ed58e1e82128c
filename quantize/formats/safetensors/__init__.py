"""Unquantized checkpoints in the Hugging Face layout: what every build starts from; opened here, not built."""
