"""Stable Diffusion 2.1 at 768 pixels, whose teacher already predicts v.

    guided-distill import --from stable-diffusion-2-1 --workdir runs/sd21
    guided-distill encode --data folder:laion768 --image_size 768 --out data/laion768_sd21 \\
        --autoencoder runs/sd21/companions/vae --text_encoder clip:runs/sd21/companions
    guided-distill train --config configs/sd21_laion768.py --workdir runs/sd21_distilled

Not in the paper, which distills an earlier Stable Diffusion; this config uses the paper's training
settings. Cost: not run. Expected results are unknown. The variant "base" is the 512-pixel model, which
predicts eps: it starts from runs/sd21_base and trains on data/laion512_sd21.
"""

from ml_collections import ConfigDict

from guided_distill.recipes import BASELINES, as_variant, chosen, latent_paper_config

SIZES = {"block_out_channels": (320, 640, 1280, 1280), "num_attention_heads": (5, 10, 20, 20)}


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant: "" for 768 pixels, "base" for 512.

    A baseline and "runlocal" (every stage in seconds) combine with both, as in "base,naive,runlocal".
    """
    names = chosen(variant, "base", *BASELINES, "runlocal")
    config = latent_paper_config()
    config.model.name = "sd_unet"
    config.model.options = {
        **SIZES,
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "remat": "blocks",
    }
    config.model.schedule_options = {"beta_start": 0.00085, "beta_end": 0.012}
    config.data.condition = {"text": (77, 1024)}
    if "base" in names:
        config.data.name = "encoded:data/laion512_sd21"
        config.data.shape = (64, 64, 4)
        config.teacher.initial = "runs/sd21_base/teacher"
    else:
        config.data.name = "encoded:data/laion768_sd21"
        config.data.shape = (96, 96, 4)
        config.start_from = "runs/sd21/teacher"
    others = [name for name in names if name != "base"]
    return as_variant(config, ",".join(others), single_w=6.5)
