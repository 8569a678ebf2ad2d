"""Evaluation of samples: feature extractors, metrics, and the table of results."""
