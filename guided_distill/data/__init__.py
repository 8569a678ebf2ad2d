"""Data: sources by name, and shuffled, resumable batches of their examples."""
