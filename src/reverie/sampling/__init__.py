"""Samplers, guidance and wrappers: mathematics on `denoise(x, sigma) -> x0` and nothing else."""
