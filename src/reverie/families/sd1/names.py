"""The original (LDM) names, which Stable Diffusion 1 shares with 2 and XL: see `reverie.families.ldm`."""

from reverie.families.ldm import TEXT, UNET, VAE, inverse, rename, unet_table, vae_table

__all__ = ["TEXT", "UNET", "VAE", "inverse", "rename", "unet_table", "vae_table"]
