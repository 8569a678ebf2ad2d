"""Text encoders: prompts to what networks are told by."""
