"""Handwritten digits, 8x8, ten classes: runs the whole method in minutes on two CPU cores.

    guided-distill train --config configs/digits.py --workdir runs/digits

Variant "long" trains longer and evaluates more samples; it produced docs/results/digits.csv.
"""

import ml_collections

from guided_distill.config import default_config
from guided_distill.recipes import chosen, shrink


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the config of a variant: "", "long" or "runlocal" (every stage in seconds)."""
    names = chosen(variant, "long", "runlocal")
    config = default_config()
    config.data.name = "digits"
    config.model.name = "mlp"
    config.model.options = {"width": 256, "depth": 4, "embedding_width": 128}
    for stage in (config.teacher, config.guidance, config.halving):
        stage.learning_rate = 1e-3
        stage.learning_rate_schedule = "cosine"
        stage.ema_decay = 0.999
    config.teacher.steps = 4000
    config.teacher.dropout = 0.1
    config.guidance.steps = 8000
    config.guidance.weighting = "snr_plus_one"
    config.guidance.clipped = config.halving.clipped = True
    config.halving.steps = 1250
    config.halving.learning_rate = 5e-4
    config.halving.learning_rate_schedule = "linear"
    config.halving.ema_decay = 0.0
    config.evaluation.teacher_num_steps = (4, 8, 64)
    if "long" in names:
        config.guidance.steps = 40_000
        config.halving.steps = 5000
        config.evaluation.num_samples = 4096
        config.evaluation.batch_size = 512
        config.evaluation.teacher_num_steps = (4, 8, 64, 256)
    return shrink(config) if "runlocal" in names else config
