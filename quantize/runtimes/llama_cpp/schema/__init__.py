"""JSON Schema, draft 2020-12, as a grammar of llama.cpp's: what a grammar can hold is held, all else is refused."""
