"""Handwritten digits, 8x8: the whole method in minutes on two CPU cores."""

from guided_distill.config import default_config, shrink


def get_config(variant: str = ""):
    """variant: "" for the demo, "long" for the measured claim, "runlocal" for seconds."""
    config = default_config()
    config.data.name = "digits"
    config.model.name = "mlp"
    config.model.options = {"width": 512, "depth": 4, "embedding_width": 128}
    return shrink(config) if variant == "runlocal" else config
