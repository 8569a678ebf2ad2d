"""A run on disk: its folder, what a checkpoint says of itself, models in one file."""
