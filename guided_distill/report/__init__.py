"""Pages, figures and files of samples that show runs."""
