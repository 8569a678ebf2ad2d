"""A run on disk: its folder, the descriptions of its checkpoints, and models in one file."""
