"""MLX: groups of integers or FP4 with scales, for Apple silicon and mlx-lm."""
