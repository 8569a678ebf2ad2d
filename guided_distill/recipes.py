"""Settings that config files share: the paper's training, its baselines, and tiny versions of runs."""

from typing import Any

import ml_collections

from guided_distill.config import METHODS, STAGES, default_config
from guided_distill.errors import UserError

BASELINES = ("single_w", *(method for method in METHODS if method != "guided"))

# For networks whose default options are those of published models.
_TINY_NETWORKS: dict[str, dict[str, Any]] = {
    "sd_unet": {
        "block_out_channels": (16,),
        "cross_attention_levels": (),
        "num_attention_heads": (2,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    },
    "dit": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
}
_TINY_OPTIONS = {
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "head_width": 16,
    "embedding_width": 16,
}


def paper_config() -> ml_collections.ConfigDict:
    """The settings of Meng et al. 2023 in pixel space that all data sets share.

    Settings that the paper leaves open follow Salimans & Ho 2022 and Ho & Salimans 2022. w in [0, 4] and
    1024 initial steps are known from reviews of the paper. Not confirmed by a source that we could read:
    the prediction of v, stage one's weighting, the average of stage one's weights, and the doubled
    training of the rounds N = 2 and N = 1. The updates of stage one are our choice.
    """
    config = default_config()
    config.data.channels = 3
    config.data.flip = True
    config.model.name = "unet"
    config.model.parameterization = "v"
    config.teacher.steps = 400_000
    config.teacher.warmup_steps = 1000
    config.teacher.ema_decay = 0.9999
    config.teacher.label_dropout = 0.1
    config.teacher.weighting = "truncated_snr"
    config.guidance.steps = 100_000
    config.guidance.ema_decay = 0.9999
    config.guidance.weighting = "snr"
    config.guidance.w_min, config.guidance.w_max = 0.0, 4.0
    config.halving.first_num_steps = 512  # The first teacher takes 1024.
    config.halving.steps = 50_000
    config.halving.few_step_factor = 2
    config.halving.learning_rate_schedule = "linear"
    config.halving.ema_decay = 0.0
    config.halving.weighting = "truncated_snr"
    config.halving.samplers = ("ddim", "stochastic")
    config.evaluation.num_samples = 50_000
    config.evaluation.weights = (0.0, 0.3, 1.0, 2.0, 4.0)
    config.evaluation.teacher_num_steps = (16, 32, 64, 1024)
    return config


def latent_paper_config() -> ml_collections.ConfigDict:
    """The settings of Meng et al. 2023 in latent space that all models share.

    w in [2, 14] for Stable Diffusion is known from reviews of the paper. Not confirmed by a source that
    we could read: 512 initial steps, 3000 updates of stage one, the updates of the rounds (their sum,
    85,000, matches the cost that InstaFlow reports), the linear decay of the learning rates, and the
    fine-tuning of the teacher to predict v. The updates of the fine-tuning and the learning rates are our
    choice.
    """
    config = default_config()
    config.model.parameterization = "v"
    config.model.schedule = "scaled_linear"
    config.model.dtype = "bfloat16"
    config.teacher.weighting = "truncated_snr"
    config.teacher.label_dropout = 0.1
    config.teacher.steps = 10_000
    config.teacher.warmup_steps = 500
    config.teacher.learning_rate = 1e-5
    config.teacher.ema_decay = 0.9999
    config.guidance.weighting = "snr"
    config.guidance.w_min, config.guidance.w_max = 2.0, 14.0
    config.guidance.steps = 3000
    config.guidance.learning_rate = 1e-5
    config.guidance.ema_decay = 0.999
    config.halving.first_num_steps = 256
    config.halving.round_steps = (*[2000] * 5, 5000, 10_000, 10_000, 50_000)
    config.halving.learning_rate = 1e-5
    config.halving.learning_rate_schedule = "linear"
    config.halving.weighting = "truncated_snr"
    for stage in (config.teacher, config.guidance, config.halving):
        stage.batch_size = 512
    config.fsdp = 0
    config.steps_per_dispatch = 1
    config.evaluation.num_samples = 5000
    config.evaluation.weights = (2.0, 4.0, 7.0, 14.0)
    config.evaluation.teacher_num_steps = (8, 16, 32, 512)
    return config


def chosen(variant: str, *known: str) -> tuple[str, ...]:
    """The comma-separated names of a config's variant. Raises UserError if one is unknown."""
    names = tuple(name.strip() for name in variant.split(",") if name)
    for name in names:
        if name not in known:
            raise UserError(
                f"the config has no variant {name!r}; choose from {', '.join(known)}, or none"
            )
    return names


def as_variant(
    config: ml_collections.ConfigDict, variant: str, *, single_w: float
) -> ml_collections.ConfigDict:
    """The config of a variant: a name of BASELINES, "runlocal" (see `shrink`), or both, with a comma.

    "single_w" and "naive" distill at w = single_w only; "naive" and "two_student" are methods of
    guided_distill.config.Experiment. A baseline has deterministic students only, and doesn't measure the
    teacher, which the main run does. Raises UserError for another name.
    """
    names = chosen(variant, *BASELINES, "runlocal")
    if "runlocal" in names:
        config = shrink(config)
    for name in names:
        if name in BASELINES:
            config.halving.samplers = ("ddim",)
            config.evaluation.teacher_num_steps = ()
        if name in METHODS:
            config.method = name
        if name in ("single_w", "naive"):
            config.guidance.w_min = config.guidance.w_max = single_w
            config.evaluation.weights = (single_w,)
    return config


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrink an experiment to seconds on a laptop: every stage, the last two rounds, a tiny network.

    The built-in photo10 replaces data that have to be downloaded or encoded first, and a teacher trained
    from scratch replaces a published one.
    """
    if ":" in config.data.name:
        config.data.update({"name": "photo10", "image_size": None, "shape": ()})
        config.data.condition = {}
    config.start_from = config.teacher.initial = None
    tiny = _TINY_NETWORKS.get(config.model.name, {})
    config.model.options = {**config.model.options.to_dict(), **tiny}
    for option in config.model.options:
        if option in _TINY_OPTIONS:
            config.model.options[option] = _TINY_OPTIONS[option]
    for stage in STAGES:
        config[stage].update({"steps": 4, "batch_size": 8, "accumulation": 1, "warmup_steps": 0})
    first, last = config.halving.first_num_steps, config.halving.last_num_steps
    while first > 2 * last:
        first //= 2
    config.halving.first_num_steps = first
    config.halving.round_steps = ()
    config.consistency.num_steps = config.consistency.num_steps[-2:]
    config.steps_per_dispatch = 1
    config.log_every = config.checkpoint_every = 2
    lowest = config.guidance.w_min
    weights = (lowest, min(lowest + 1.0, config.guidance.w_max))
    config.evaluation.update(
        {"num_samples": 32, "batch_size": 16, "teacher_num_steps": (2, 4), "weights": weights}
    )
    return config
