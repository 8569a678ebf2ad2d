"""Sampling from a trained stage: requests, compiled programs, and their calls."""
