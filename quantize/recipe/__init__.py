"""What the user writes: the model of a recipe, and the YAML that it is read from."""
