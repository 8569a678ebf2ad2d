"""32x32 colour patches from ten photographs: images of CIFAR-10's shape, with nothing to download.

    guided-distill train --config configs/photo10.py --workdir runs/photo10

The network is a patch transformer, meant for an accelerator; the variant "unet" uses a small U-Net
instead. Cost: not run to the end.
"""

import ml_collections

from guided_distill.config import default_config
from guided_distill.recipes import chosen, shrink


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the config of a variant: "", "unet", "runlocal" (stages in seconds) or "unet,runlocal"."""
    names = chosen(variant, "unet", "runlocal")
    config = default_config()
    config.data.name = "photo10"
    config.data.flip = True
    config.model.name = "transformer"
    config.model.options = {
        "width": 256,
        "depth": 6,
        "num_heads": 4,
        "patch_size": 4,
        "embedding_width": 256,
    }
    if "unet" in names:
        config.model.name = "unet"
        config.model.options = {
            "width": 64,
            "channel_multipliers": (1, 2, 2),
            "blocks_per_level": 2,
            "attention_resolutions": (16,),
            "head_width": 64,
            "embedding_width": 256,
        }
    config.teacher.steps = 50_000
    config.teacher.learning_rate = 3e-4
    config.teacher.warmup_steps = 1000
    config.teacher.dropout = 0.1
    config.teacher.ema_decay = 0.9999
    config.guidance.steps = 20_000
    config.guidance.learning_rate = 3e-4
    config.guidance.ema_decay = 0.9999
    config.halving.steps = 5000
    config.halving.learning_rate = 1e-4
    config.halving.learning_rate_schedule = "linear"
    config.halving.first_num_steps = 128
    config.evaluation.teacher_num_steps = (4, 8, 16, 64, 256)
    return shrink(config) if "runlocal" in names else config
