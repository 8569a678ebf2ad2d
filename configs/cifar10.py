"""CIFAR-10, class-conditional, at the scale of Meng et al. 2023 (a table of its supplement).

    guided-distill train --config configs/cifar10.py --workdir runs/cifar10

Data: TFDS's cifar10, prepared on disk (guided_distill/data/tfds.py). Cost: not run. Expected: a
leaderboard quotes a best FID of 5.98 for the paper, without w or the number of steps.

The baselines "single_w" (at w = 0.3), "two_student" and "naive" share the main run's teacher: add
--config.start_from=runs/cifar10/teacher. For another w, set config.guidance.w_min and w_max to it, and
config.evaluation.weights to "(w,)".
"""

from ml_collections import ConfigDict

from guided_distill.recipes import as_variant, paper_config


def get_config(variant: str = "") -> ConfigDict:
    """variant: "", "single_w", "two_student", "naive" or "runlocal", or one with it: "naive,runlocal"."""
    config = paper_config()
    config.data.name = "tfds:cifar10"
    config.data.shape = (32, 32, 3)
    config.data.condition = {"label": 10}
    # Salimans & Ho's network, here conditioned on the label, and their training; the teacher's number
    # of updates is our choice.
    config.model.options = {
        "width": 256,
        "channel_multipliers": (1, 1, 1),
        "blocks_per_level": 3,
        "attention_resolutions": (16, 8),
        "head_width": 256,
        "embedding_width": 1024,
    }
    for stage in (config.teacher, config.guidance, config.halving):
        stage.batch_size = 128
    config.teacher.learning_rate = 2e-4
    config.teacher.weight_decay = 0.001
    config.teacher.dropout = 0.2
    # Not confirmed by any source we could read.
    config.guidance.learning_rate = 1e-3
    config.halving.learning_rate = 5e-5
    return as_variant(config, variant, single_w=0.3)
