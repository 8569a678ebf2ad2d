"""Your own images at 16x16: from a folder to students in a quarter of an hour on two CPU cores.

    guided-distill train --config configs/own_images.py --config.data.name=folder:PATH --workdir runs/own

Each subfolder of PATH is a class. On an accelerator, with many thousands of images, raise
data.image_size, the network's width and the number of updates: configs/cifar10.py has the paper's
settings, as far as they are known.
"""

import ml_collections

from guided_distill.config import default_config
from guided_distill.recipes import chosen, shrink


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the config of a variant: "" or "runlocal" (every stage in seconds)."""
    names = chosen(variant, "runlocal")
    config = default_config()
    config.data.name = "folder:images"
    config.data.image_size = 16
    config.data.channels = 3
    config.data.flip = True
    config.model.name = "unet"
    config.model.options = {
        "width": 32,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (4,),
        "head_width": 32,
        "embedding_width": 128,
        "patch_size": 2,
    }
    # More than one update per call is slow on a CPU: see training/step.py.
    config.steps_per_dispatch = 1
    for stage in (config.teacher, config.guidance, config.halving):
        stage.batch_size = 32
        stage.learning_rate_schedule = "cosine"
        stage.learning_rate = 1e-3
        stage.ema_decay = 0.999
    config.teacher.steps = 2000
    config.teacher.warmup_steps = 100
    config.guidance.steps = 1000
    config.guidance.weighting = "snr_plus_one"
    config.guidance.clipped = config.halving.clipped = True
    config.halving.first_num_steps = 8
    config.halving.steps = 200
    config.halving.learning_rate = 3e-4
    config.halving.ema_decay = 0.0
    config.evaluation.num_samples = 512
    config.evaluation.teacher_num_steps = (4, 8, 32)
    return shrink(config) if "runlocal" in names else config
