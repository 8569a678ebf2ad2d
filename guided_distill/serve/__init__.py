"""A local page to sample from a run: `guided-distill serve`."""
