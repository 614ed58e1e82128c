"""The full-precision model: where it comes from, what is in its files, what each tensor is."""
