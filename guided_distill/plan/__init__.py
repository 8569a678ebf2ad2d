"""Estimates of time and memory for TPUs that aren't attached: programs are compiled, not run."""
