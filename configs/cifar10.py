"""CIFAR-10, class-conditional, at the scale of Meng et al. 2023 (table in its supplement).

    guided-distill train --config configs/cifar10.py --workdir runs/cifar10

Data: TFDS's cifar10, prepared on disk (guided_distill/data/tfds.py). Cost: not run. Expected: a
leaderboard quotes the paper's best FID as 5.98, without w or the number of steps.

The baselines "single_w" (at w = 0.3), "two_student" and "naive" share the main run's teacher: add
--config.start_from=runs/cifar10/teacher. For another w, set config.guidance.w_min and w_max to it, and
config.evaluation.weights to "(w,)".
"""

from ml_collections import ConfigDict

from guided_distill.recipes import as_variant, paper_config


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "", "single_w", "two_student", "naive" or "runlocal".

    "runlocal" makes every stage take seconds, and combines with the others, as in "naive,runlocal".
    """
    config = paper_config()
    config.data.name = "tfds:cifar10"
    config.data.shape = (32, 32, 3)
    config.data.condition = {"label": 10}
    # Salimans & Ho's network, here conditioned on the label, and their training settings. We chose the
    # teacher's number of updates.
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
    # No source that we could read confirms these.
    config.guidance.learning_rate = 1e-3
    config.halving.learning_rate = 5e-5
    return as_variant(config, variant, single_w=0.3)
