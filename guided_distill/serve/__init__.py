"""A local page that samples from a run: `guided-distill serve`."""
