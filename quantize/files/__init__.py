"""Bytes on disk that several backends share: safetensors shards and GGUF files."""
