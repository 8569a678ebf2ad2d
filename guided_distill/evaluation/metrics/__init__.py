"""Metrics of samples, as pure functions from arrays to numbers."""
