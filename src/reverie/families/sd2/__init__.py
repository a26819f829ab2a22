"""Stable Diffusion 2.x: OpenCLIP ViT-H/14 text encoder, U-Net with heads of 64 channels, epsilon or v prediction."""
