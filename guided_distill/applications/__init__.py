"""What distilled models are used for."""
