"""Stable Diffusion 1.5 at 512 pixels, distilled as in the latent-space sections of Meng et al. 2023.

    guided-distill import --from stable-diffusion-v1-5 --workdir runs/sd15
    guided-distill encode --data folder:laion512 --image_size 512 --out data/laion512_sd15 \\
        --autoencoder runs/sd15/companions/vae --text_encoder clip:runs/sd15/companions
    guided-distill train --config configs/sd15_laion512.py --workdir runs/sd15_distilled

The imported model predicts eps; the teacher stage fine-tunes it to predict v. Cost: not run; InstaFlow
estimates the paper's cost at 108.8 A100 days. Expected, as Adversarial Diffusion Distillation (table 2)
quotes the paper: FIDs of 37.2, 26.0 and 26.4 and CLIP scores of 0.275, 0.297 and 0.300 at 1, 2 and 4
steps, on 5,000 captions from COCO 2017.
"""

from ml_collections import ConfigDict

from guided_distill.recipes import as_variant, latent_paper_config


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "", "single_w", "two_student", "naive" or "runlocal".

    "runlocal" makes every stage take seconds, and combines with the others, as in "naive,runlocal".
    """
    config = latent_paper_config()
    config.data.name = "encoded:data/laion512_sd15"
    config.data.shape = (64, 64, 4)
    config.data.condition = {"text": (77, 768)}
    config.model.name = "sd_unet"
    config.model.options = {"remat": "blocks"}
    config.model.schedule_options = {"beta_start": 0.00085, "beta_end": 0.012}
    config.teacher.initial = "runs/sd15/teacher"
    return as_variant(config, variant, single_w=6.5)
