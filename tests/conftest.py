"""Strict numerics for every test: rank promotion raises, and four devices are simulated."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

import jax
import matplotlib

jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("Agg")
