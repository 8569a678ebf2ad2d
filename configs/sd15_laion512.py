"""Stable Diffusion 1.5 at 512 pixels, distilled as in Meng et al. 2023, sections on latent space.

    guided-distill import --from stable-diffusion-v1-5 --workdir runs/sd15
    guided-distill encode --data folder:laion512 --image_size 512 --out data/laion512_sd15 \\
        --autoencoder runs/sd15/companions/vae --text_encoder clip:runs/sd15/companions
    guided-distill train --config configs/sd15_laion512.py --workdir runs/sd15_distilled

The teacher predicts eps; the first stage makes it predict v. Cost: not run; others estimate the paper's
at 108.8 A100 days (InstaFlow). Expected, as others quote the paper: an FID of 37.2, 26.0 and 26.4 and a
CLIP score of 0.275, 0.297 and 0.300 at 1, 2 and 4 steps, on 5,000 captions of COCO 2017 (Adversarial
Diffusion Distillation, table 2).
"""

from ml_collections import ConfigDict

from guided_distill.recipes import as_variant, latent_paper_config


def get_config(variant: str = "") -> ConfigDict:
    """variant: "", "single_w", "two_student", "naive" or "runlocal", or one with it."""
    config = latent_paper_config()
    config.data.name = "encoded:data/laion512_sd15"
    config.data.shape = (64, 64, 4)
    config.data.condition = {"text": (77, 768)}
    config.model.name = "sd_unet"
    config.model.options = {"remat": "blocks"}
    config.model.schedule_options = {"beta_start": 0.00085, "beta_end": 0.012}
    config.teacher.initial = "runs/sd15/teacher"
    return as_variant(config, variant, single_w=6.5)
