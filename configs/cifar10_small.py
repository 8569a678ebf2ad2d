"""CIFAR-10 at 16x16 on two CPU cores: the whole method and the paper's baselines at a small scale.

    guided-distill train --config configs/cifar10_small.py --workdir runs/cifar10_small

The data are two files, data/cifar10_jpeg_train.npz and ..._test.npz, which aren't distributed. You can
use any npz files of CIFAR-10's images instead, one per split, with the fields image, label and
class_names (see guided_distill/data/npz.py); the numbers will differ. Cost, on a machine that was also
doing other work: 75 minutes for the teacher, about an hour for stage one and another for the
deterministic rounds, plus evaluation. The chains of the two other samplers were run down to 8 steps
only; the whole config has not been run.

The variants share the main run's teacher: add --config.start_from=runs/cifar10_small/teacher.
"single_w" distills at w = 1 alone; "two_student" and "naive" are the paper's baselines without stage
one (see guided_distill/config.py, Experiment).
"""

import ml_collections

from guided_distill.config import default_config
from guided_distill.recipes import as_variant


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the config of a variant: "", "single_w", "two_student", "naive" or "runlocal".

    "runlocal" makes every stage take seconds, and combines with the others, as in "naive,runlocal".
    """
    config = default_config()
    config.data.name = "npz:data/cifar10_jpeg_{split}.npz"
    config.data.image_size = 16
    config.data.channels = 3
    config.data.flip = True
    config.model.name = "unet"
    config.model.options = {
        "width": 48,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (4,),
        "head_width": 32,
        "embedding_width": 192,
        "patch_size": 2,
    }
    # More than one update per call is slow on a CPU: see training/step.py.
    config.steps_per_dispatch = 1
    config.checkpoint_every = 500
    for stage in (config.teacher, config.guidance, config.halving):
        stage.batch_size = 64
        stage.learning_rate_schedule = "cosine"
    config.teacher.steps = 16_000
    config.teacher.learning_rate = 1e-3
    config.teacher.warmup_steps = 500
    config.teacher.ema_decay = 0.999
    config.guidance.steps = 4000
    config.guidance.learning_rate = 5e-4
    config.guidance.ema_decay = 0.999
    config.guidance.weighting = "snr_plus_one"
    config.guidance.clipped = config.halving.clipped = True
    config.halving.steps = 500
    config.halving.learning_rate = 3e-4
    config.halving.learning_rate_schedule = "linear"
    config.halving.samplers = ("ddim", "stochastic", "encode")
    config.evaluation.num_samples = 2048
    config.evaluation.teacher_num_steps = (4, 8, 16, 64, 256)
    if "single_w" in variant:
        config.guidance.steps = 2000
    return as_variant(config, variant, single_w=1.0)
