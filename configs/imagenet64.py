"""ImageNet 64x64, class-conditional, at the scale of Meng et al. 2023, table 1.

    guided-distill train --config configs/imagenet64.py --workdir runs/imagenet64

Data: TFDS's imagenet_resized/64x64, prepared on disk (guided_distill/data/tfds.py); TFDS's
downsampled_imagenet has no labels. Cost: not run. Expected, as other papers quote it: FIDs of 18.5,
5.81, 2.24 and 2.31 for the stochastic students with 1, 2, 4 and 8 steps (Multistep Consistency Models,
table 5; no source we could read confirms that w was 0.3), and 7.54 for the best one-step student
(Distribution Matching Distillation, table 1).

The baselines "single_w" (at w = 0.3), "two_student" and "naive" share the main run's teacher: add
--config.start_from=runs/imagenet64/teacher. For another w, set config.guidance.w_min and w_max to it,
and config.evaluation.weights to "(w,)".
"""

from ml_collections import ConfigDict

from guided_distill.recipes import as_variant, paper_config


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "", "single_w", "two_student", "naive" or "runlocal".

    "runlocal" makes every stage take seconds, and combines with the others, as in "naive,runlocal".
    """
    config = paper_config()
    config.data.name = "tfds:imagenet_resized/64x64"
    config.data.shape = (64, 64, 3)
    config.data.condition = {"label": 1000}
    # Salimans & Ho's network, except for its output, and their training settings. The teacher's number
    # of updates is Ho & Salimans'.
    config.model.dtype = "bfloat16"
    config.model.options = {
        "width": 192,
        "channel_multipliers": (1, 2, 3, 4),
        "blocks_per_level": 3,
        "attention_resolutions": (32, 16, 8),
        "head_width": 64,
        "embedding_width": 768,
        "remat": "blocks",
    }
    # On 16 v5e chips, replicated weights would leave less than a tenth of the memory free.
    config.fsdp = 0
    # Several batches of this size per call would fill the memory.
    config.steps_per_dispatch = 1
    for stage in (config.teacher, config.guidance, config.halving):
        stage.batch_size = 2048
        # Without accumulation, an update needs more memory than 16 v5e chips have.
        stage.accumulation = 2
    config.teacher.learning_rate = 3e-4
    config.teacher.dropout = 0.1
    # No source that we could read confirms these.
    config.guidance.learning_rate = 3e-4
    config.halving.learning_rate = 1e-4
    # "encode" trains the encoder of the paper's style transfer.
    config.halving.samplers = ("ddim", "stochastic", "encode")
    return as_variant(config, variant, single_w=0.3)
