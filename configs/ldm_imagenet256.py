"""The class-conditional latent diffusion model for ImageNet 256x256 (Rombach et al. 2022), distilled.

    guided-distill import --from cin256-v2.safetensors --workdir runs/cin256
    guided-distill encode --data tfds:imagenet2012 --image_size 256 --flip \\
        --autoencoder runs/cin256/companions/vae --out data/imagenet256_cin256
    guided-distill train --config configs/ldm_imagenet256.py --workdir runs/cin256_distilled

Meng et al. 2023, section on ImageNet 256x256. No source we could read confirms the range w in [0, 14] or
the rounds, which are those for Stable Diffusion. Cost: not run. Expected, according to reviews of the
paper: students with 2 to 4 steps reach the teacher's FID.
"""

from ml_collections import ConfigDict

from guided_distill.recipes import as_variant, latent_paper_config


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "", "single_w", "two_student", "naive" or "runlocal".

    "runlocal" makes every stage take seconds, and combines with the others, as in "naive,runlocal".
    """
    config = latent_paper_config()
    config.data.name = "encoded:data/imagenet256_cin256"
    config.data.shape = (64, 64, 3)
    config.data.condition = {"label": 1000}
    config.model.name = "sd_unet"
    config.model.options = {
        "block_out_channels": (192, 384, 576, 960),
        "cross_attention_levels": (1, 2, 3),
        "num_attention_heads": (1, 1, 1, 1),
        "cross_attention_dim": 512,
        "remat": "blocks",
    }
    config.model.schedule_options = {"beta_start": 0.0015, "beta_end": 0.0195}
    config.teacher.initial = "runs/cin256/teacher"
    config.guidance.w_min, config.guidance.w_max = 0.0, 14.0
    config.evaluation.num_samples = 50_000
    config.evaluation.weights = (0.0, 1.0, 2.0, 4.0)
    return as_variant(config, variant, single_w=1.0)
