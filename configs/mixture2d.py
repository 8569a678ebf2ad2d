"""A class-conditional Gaussian mixture in the plane, whose exact guided target is known.

    guided-distill train --config configs/mixture2d.py --workdir runs/mixture2d

Cost: a few minutes on two CPU cores.
"""

import ml_collections

from guided_distill.config import default_config
from guided_distill.recipes import chosen, shrink


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the config of a variant: "" or "runlocal" (every stage in seconds)."""
    names = chosen(variant, "runlocal")
    config = default_config()
    config.data.name = "mixture2d"
    config.model.name = "mlp"
    config.model.options = {"width": 128, "depth": 3, "embedding_width": 64}
    for stage in (config.teacher, config.guidance, config.halving):
        stage.batch_size = 512
        stage.learning_rate = 1e-3
        stage.learning_rate_schedule = "cosine"
    config.teacher.steps = 4000
    config.teacher.ema_decay = 0.999
    config.guidance.steps = 4000
    config.guidance.ema_decay = 0.999
    config.guidance.weighting = "snr_plus_one"
    config.halving.steps = 1500
    config.halving.learning_rate = 5e-4
    config.halving.learning_rate_schedule = "linear"
    config.halving.first_num_steps = 16
    config.halving.samplers = ("ddim", "stochastic")
    config.evaluation.teacher_samplers = ("ddim", "ancestral", "dpm_solver_pp")
    return shrink(config) if "runlocal" in names else config
