"""Mutated input for every reader of files that someone else may have written."""
