"""Stable Diffusion 1.x: CLIP ViT-L/14 text encoder, U-Net with 8 heads, KL-f8 autoencoder."""
