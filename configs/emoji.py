"""Text to image, complete and small: captioned emoji at 32x32 pixels.

    guided-distill prepare emoji --out data/emoji3.npz
    guided-distill prepare minilm --out data/minilm
    guided-distill train --config configs/emoji.py --workdir runs/emoji

The data are 5,664 images in three drawing styles; a tenth of the emoji names is held out. The run trains
an autoencoder with latents of 4 x 8 x 8, then a teacher conditioned on captions that all-MiniLM-L6-v2
encodes. Both have Stable Diffusion's architecture, so the students run in its pipelines. Not in the
paper. Cost, estimated from its parts: minutes on a GPU and hours on two CPU cores (not run from start to
end at once).
"""

from ml_collections import ConfigDict

from guided_distill.config import STAGES, default_config
from guided_distill.recipes import BASELINES, as_variant, chosen


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "", "single_w", "two_student", "naive" or "runlocal".

    "runlocal" makes every stage take seconds, and combines with the others, as in "naive,runlocal". It
    needs the prepared data and text encoder too.
    """
    names = chosen(variant, *BASELINES, "runlocal")
    config = default_config()
    config.data.name = "npz:data/emoji3.npz"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.flip = True
    config.data.text_encoder = "minilm:data/minilm"
    config.autoencoder.options = {
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    config.model.name = "sd_unet"
    config.model.schedule = "scaled_linear"
    config.model.schedule_options = {"beta_start": 0.00085, "beta_end": 0.012}
    config.model.options = {
        "block_out_channels": (64, 128),
        "cross_attention_levels": (1,),
        "num_attention_heads": (2, 4),
        "layers_per_block": 1,
        "cross_attention_dim": 384,
        # Few groups, because normalization removes what time and w add to all channels of a group.
        "norm_num_groups": 8,
    }
    # More than one update per call is slow on a CPU: see training/step.py.
    config.steps_per_dispatch = 1
    config.checkpoint_every = 500
    config.autoencoder.steps = 4000
    config.autoencoder.batch_size = 32
    config.autoencoder.learning_rate = 1e-3
    config.autoencoder.learning_rate_schedule = "cosine"
    config.autoencoder.warmup_steps = 100
    config.teacher.steps = 12_000
    config.teacher.learning_rate = 1e-3
    config.teacher.warmup_steps = 500
    config.teacher.ema_decay = 0.999
    config.guidance.steps = 12_000
    config.guidance.learning_rate = 5e-4
    config.guidance.ema_decay = 0.999
    config.guidance.weighting = "snr_plus_one"
    config.guidance.w_max = 6.0
    config.halving.first_num_steps = 16
    config.halving.steps = 600
    config.halving.learning_rate = 3e-4
    for stage in (config.teacher, config.guidance, config.halving):
        stage.batch_size = 32
        stage.learning_rate_schedule = "cosine"
    config.guidance.batch_size = 64
    config.evaluation.extractor = "lite0"
    config.evaluation.num_samples = 2048
    config.evaluation.weights = (0.0, 1.0, 2.0, 4.0)
    config.evaluation.teacher_num_steps = (4, 8, 32, 256)
    if "runlocal" in names:
        config.autoencoder.update({"steps": 4, "batch_size": 8, "warmup_steps": 0})
        config.autoencoder.options.update({"block_out_channels": (8, 8), "norm_num_groups": 4})
        config.model.options.update(
            {
                "block_out_channels": (16,),
                "cross_attention_levels": (),
                "num_attention_heads": (2,),
                "norm_num_groups": 4,
            }
        )
        for name in STAGES:
            config[name].update({"steps": 4, "batch_size": 8, "warmup_steps": 0})
        config.halving.first_num_steps = 2
        config.log_every = config.checkpoint_every = 2
        config.evaluation.update(
            {"num_samples": 16, "teacher_num_steps": (2,), "weights": (0.0, 1.0), "batch_size": 8}
        )
    baselines = [name for name in names if name != "runlocal"]
    return as_variant(config, ",".join(baselines), single_w=1.0)
