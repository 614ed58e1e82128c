"""transformers with the libraries that its quantized formats need: load, run."""
