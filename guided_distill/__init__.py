"""Distillation of classifier-free guided diffusion models, in JAX and Flax."""
