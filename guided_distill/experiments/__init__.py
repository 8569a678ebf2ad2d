"""Sweeps and studies: many runs of one config, and the table of their results."""
