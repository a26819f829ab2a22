"""Diffusion mathematics: how noise enters, what a network predicts, which noise levels are visited."""
