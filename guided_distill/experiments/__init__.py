"""Sweeps and studies: many runs from one config, and their table."""
