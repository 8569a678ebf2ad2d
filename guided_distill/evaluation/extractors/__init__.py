"""Networks that map images to features and class logits, by name."""
