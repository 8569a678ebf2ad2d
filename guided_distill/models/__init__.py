"""Flax networks. A network never knows which stage uses it."""
