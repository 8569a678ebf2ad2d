"""Handwritten digits, 8x8: the whole method in minutes on two CPU cores."""

from guided_distill.config import default_config, shrink


def get_config(variant: str = ""):
    """variant: "" for the demo, "long" for the measured claim, "runlocal" for seconds."""
    config = default_config()
    config.data.name = "digits"
    config.model.name = "mlp"
    config.model.options = {"width": 256, "depth": 4, "embedding_width": 128}
    for stage in (config.teacher, config.guidance, config.halving):
        stage.batch_size = 128
        stage.learning_rate = 1e-3
        stage.learning_rate_schedule = "cosine"
        stage.ema_decay = 0.999
    config.teacher.steps = 8000
    config.teacher.dropout = 0.1
    config.guidance.steps = 8000
    config.halving.steps = 4000
    config.halving.learning_rate = 5e-4
    config.halving.learning_rate_schedule = "linear"
    config.halving.ema_decay = 0.0
    config.halving.first_num_steps = 32
    return shrink(config) if variant == "runlocal" else config
