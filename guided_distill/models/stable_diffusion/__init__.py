"""Latent diffusion networks (Rombach et al. 2022), whose weights have diffusers' names and shapes."""
