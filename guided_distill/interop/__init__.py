"""Trained stages in and out of a run's folder."""
