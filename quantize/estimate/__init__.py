"""What a model takes of a GPU, and whether it fits the one that is there."""
