"""A GGUF file of the bytes that fit: types are chosen for each matrix by what their errors cost the model."""
