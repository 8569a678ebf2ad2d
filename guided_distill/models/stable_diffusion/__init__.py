"""Latent diffusion (Rombach et al. 2022), with diffusers' names and shapes of weights."""
