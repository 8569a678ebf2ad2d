"""Text encoders: prompts to what networks are conditioned on."""
