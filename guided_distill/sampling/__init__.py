"""Samples from a trained stage: what is asked for, the compiled programs, and their calls."""
