"""mlx-lm: MLX artifacts, on Apple silicon and on a CPU."""
