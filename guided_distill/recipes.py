"""What config files share: the paper's training in pixel space, its baselines, a run made small."""

from typing import Any

import ml_collections

from guided_distill.config import METHODS, STAGES, default_config
from guided_distill.errors import UserError

BASELINES = ("single_w", *(method for method in METHODS if method != "guided"))

# Of networks whose defaults are those of published models.
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
    """The training of Meng et al. 2023 in pixel space, as far as it is the same for all data sets.

    What the paper leaves to its parents is theirs: Salimans & Ho 2022, Ho & Salimans 2022. Of the
    paper's own, w in [0, 4] and 1024 steps at the start are known from reviews of it. Not confirmed by a
    source we could read: that it predicts v, stage one's weighting, and that it keeps stage one's average
    and trains the rounds N = 2 and N = 1 twice as long. The updates of stage one are our choice.
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
    config.halving.first_num_steps = 512  # The guidance stage's model is sampled with 1024.
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
    """The training of Meng et al. 2023 in latent space, as far as it is the same for all models.

    Known from reviews of the paper: w in [2, 14] for Stable Diffusion. Not confirmed by a source we could
    read: 512 steps at the start, 3000 updates of stage one, the updates of the rounds (their sum, 85,000,
    is what InstaFlow's price of it comes to), the learning rates' linear fall, and that the teacher first
    learns to predict v. How long it learns that, and the learning rates, are our choice.
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
    """The names in a config's variant, separated by commas. Raises UserError for one that isn't known."""
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
    """The config changed as `variant` says: a name of BASELINES, "runlocal" (see `shrink`), or both.

    Both are joined by a comma. "single_w" distills at w = single_w alone; "naive", at that w too, and
    "two_student" are methods of guided_distill.config.Experiment. A baseline has no student but the
    deterministic one, and leaves the measures of the teacher to the main run.

    Raises UserError for another name.
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
    """The same experiment in seconds on a laptop: every stage, the last two rounds, a tiny network.

    Data that have to be fetched or encoded first are replaced by the pixels of the built-in photo10, and
    a published teacher by one that is trained.
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
    config.steps_per_dispatch = 1
    config.log_every = config.checkpoint_every = 2
    lowest = config.guidance.w_min
    weights = (lowest, min(lowest + 1.0, config.guidance.w_max))
    config.evaluation.update(
        {"num_samples": 32, "batch_size": 16, "teacher_num_steps": (2, 4), "weights": weights}
    )
    return config
