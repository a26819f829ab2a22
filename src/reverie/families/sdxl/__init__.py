"""Stable Diffusion XL, base and refiner, and what was distilled from it: two text encoders, a vector of sizes."""
