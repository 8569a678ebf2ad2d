"""Fashion-MNIST at 28x28: the whole method and the paper's baselines on a standard data set.

    guided-distill prepare fashion_mnist --out data
    guided-distill train --config configs/fashion_mnist.py --workdir runs/fashion_mnist

The first command writes two files, data/fashion_mnist_train.npz and ..._test.npz, with the data set's
own 60,000 and 10,000 images, from Debian's package dataset-fashion-mnist. To read images prepared by
TensorFlow Datasets instead, add --config.data.name=tfds:fashion_mnist.

The variants share the main run's teacher: add --config.start_from=runs/fashion_mnist/teacher.
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
    config.data.name = "npz:data/fashion_mnist_{split}.npz"
    config.data.image_size = 28
    config.model.name = "unet"
    config.model.options = {
        "width": 32,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (7,),
        "head_width": 32,
        "embedding_width": 128,
        "patch_size": 2,
    }
    # More than one update per call is slow on a CPU: see training/step.py.
    config.steps_per_dispatch = 1
    config.checkpoint_every = 500
    for stage in (config.teacher, config.guidance, config.halving):
        stage.batch_size = 64
        stage.learning_rate_schedule = "cosine"
    config.teacher.steps = 40_000
    config.teacher.learning_rate = 1e-3
    config.teacher.warmup_steps = 500
    config.teacher.ema_decay = 0.9995
    config.guidance.steps = 6000
    config.guidance.learning_rate = 5e-4
    config.guidance.ema_decay = 0.999
    config.guidance.weighting = "snr_plus_one"
    config.guidance.clipped = config.halving.clipped = True
    config.halving.first_num_steps = 64
    config.halving.steps = 600
    config.halving.learning_rate = 3e-4
    config.halving.learning_rate_schedule = "linear"
    config.halving.samplers = ("ddim", "stochastic", "encode")
    config.evaluation.num_samples = 10_000
    config.evaluation.weights = (0.0, 0.3, 1.0, 2.0, 4.0)
    config.evaluation.teacher_num_steps = (1, 2, 4, 8, 16, 64, 256)
    return as_variant(config, variant, single_w=1.0)
