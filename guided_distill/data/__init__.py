"""Data: sources by name, and the shuffled, resumable batches made of them."""
