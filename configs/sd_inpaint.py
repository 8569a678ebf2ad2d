"""Stable Diffusion's in-painting model at 512 pixels, distilled.

    guided-distill import --from stable-diffusion-inpainting --workdir runs/sd_inpaint
    guided-distill encode --data folder:laion512 --image_size 512 --inpaint --out data/laion512_inpaint \\
        --autoencoder runs/sd_inpaint/companions/vae --text_encoder clip:runs/sd_inpaint/companions
    guided-distill train --config configs/sd_inpaint.py --workdir runs/sd_inpaint_distilled

Meng et al. 2023, section on in-painting. We couldn't obtain the paper's masks, so we draw our own
(guided_distill/prepare/masks.py). Cost: not run. Expected: images as good as the teacher's with 2 to 4
steps.
"""

from ml_collections import ConfigDict

from guided_distill.recipes import as_variant, latent_paper_config


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "", "single_w", "two_student", "naive" or "runlocal".

    "runlocal" makes every stage take seconds, and combines with the others, as in "naive,runlocal".
    """
    config = latent_paper_config()
    config.data.name = "encoded:data/laion512_inpaint"
    config.data.shape = (64, 64, 4)
    config.data.condition = {"text": (77, 768), "inpaint": (64, 64, 5)}
    config.model.name = "sd_unet"
    config.model.options = {"remat": "blocks"}
    config.model.schedule_options = {"beta_start": 0.00085, "beta_end": 0.012}
    config.teacher.initial = "runs/sd_inpaint/teacher"
    return as_variant(config, variant, single_w=6.5)
