"""What training will take on machines that are not there: compiled for them, not run."""
