"""Bytes on disk that several builders share: safetensors shards and GGUF files."""
