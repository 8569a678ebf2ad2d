"""DiT-XL/2 for ImageNet 256x256 (Peebles & Xie 2023), distilled.

    guided-distill import --from DiT-XL-2-256 --workdir runs/dit256
    guided-distill encode --data tfds:imagenet2012 --image_size 256 --flip \\
        --autoencoder runs/dit256/companions/vae --out data/imagenet256_dit
    guided-distill train --config configs/dit_imagenet256.py --workdir runs/dit256_distilled

Not in the paper: this config applies the paper's training for ImageNet 256x256 to a newer teacher.
Cost: not run. Expected results are unknown.
"""

from ml_collections import ConfigDict

from guided_distill.recipes import as_variant, latent_paper_config


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "", "single_w", "two_student", "naive" or "runlocal".

    "runlocal" makes every stage take seconds, and combines with the others, as in "naive,runlocal".
    """
    config = latent_paper_config()
    config.data.name = "encoded:data/imagenet256_dit"
    config.data.shape = (32, 32, 4)
    config.data.condition = {"label": 1000}
    config.model.name = "dit"
    config.model.schedule = "linear"
    config.model.schedule_options = {"beta_start": 1e-4, "beta_end": 0.02}
    config.teacher.initial = "runs/dit256/teacher"
    config.guidance.w_min, config.guidance.w_max = 0.0, 4.0
    config.evaluation.num_samples = 50_000
    config.evaluation.weights = (0.0, 0.5, 1.5, 4.0)
    return as_variant(config, variant, single_w=0.5)
