"""Weights and configs as other programs keep them on disk, and what they are here."""
