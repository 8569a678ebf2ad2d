"""Text encoders, which turn prompts into the states that networks are conditioned on."""
