# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # From a Stable Diffusion folder to a student with four calls, and back
#
# This notebook imports a folder written by diffusers, distills the model, and exports a folder that
# diffusers loads. It runs on two CPU cores because the model is small: 32 x 32 pixels, in the layout
# of Stable Diffusion.

# %%
import importlib.metadata
import os
import sysconfig
from pathlib import Path

# Commands after ! come from this kernel's environment.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
try:
    importlib.metadata.version("guided_distill")
except importlib.metadata.PackageNotFoundError:
    # From the clone that this notebook lies in, or from PyPI. GUIDED_DISTILL_SOURCE can name something else
    # that pip installs, such as "guided_distill[report,text] @ git+https://..."
    around = [Path.cwd(), *Path.cwd().parents]
    clones = [str(each) for each in around if (each / "guided_distill/__init__.py").is_file()]
    default = f"{(clones or ['guided_distill'])[0]}[report,text]"
    source = os.environ.get("GUIDED_DISTILL_SOURCE") or default
    # %pip install --quiet "{source}"

importlib.metadata.version("guided_distill")

# %%
variant = ""  # "runlocal" makes everything tiny.

updates, pictures = {"": ((120, 60), 64), "runlocal": ((2, 2), 8)}[variant]

# %% [markdown]
# ## The folder
#
# In place of Stable Diffusion, this notebook uses the teacher from `docs/results/emoji` in a clone
# of this repository: a U-Net in latent space, conditioned on text, in one file with its autoencoder
# beside it. `export` turns that file into a run, and then into a folder such as diffusers writes. Its
# text encoder, all-MiniLM-L6-v2, is downloaded once.
#
# For Stable Diffusion 1.5, use a folder written by `save_pretrained`, or download it with `--from
# hub:ID` in the import cell below; its config is `configs/sd15_laion512.py`.

# %%
import warnings
from pathlib import Path

from etils import epath

import guided_distill
from guided_distill.text.registry import copy_text_encoder

# Once JAX is loaded, it warns when a cell starts a command; these commands don't affect it.
warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)

name = "docs/results/emoji/teacher.safetensors"
clones = [Path.cwd(), *Path.cwd().parents, Path(guided_distill.__file__).parents[1]]
trained = next((each / name for each in clones if (each / name).is_file()), None)
if trained is None:
    raise SystemExit(f"Open this notebook in a clone of the repository, which has {name}.")

# %%
# !test -d runs/emoji || guided-distill export --workdir {trained} --out runs/emoji

# %%
# !test -d data/minilm || guided-distill prepare minilm --out data/minilm

# %%
copy_text_encoder("minilm:data/minilm", epath.Path("runs/emoji/companions"))

# %%
# !guided-distill export --workdir runs/emoji --stages teacher --format diffusers --out teacher_folder

# %% [markdown]
# ## Import it
#
# The U-Net becomes a teacher like one that was trained here. The autoencoder, text encoder, tokenizer and
# scheduler are copied beside it, byte for byte.

# %%
# !guided-distill import --from teacher_folder --workdir runs/imported

# %% [markdown]
# ## Data
#
# Normally, the data set is a folder of images with captions, which is encoded once. Here, the teacher
# generates the images from sixteen captions, and the students learn only these. `w` is the guidance
# weight of the paper: diffusers' `guidance_scale` is $1 + w$.

# %%
import numpy as np

things = ("red heart", "yellow heart", "green heart", "purple heart")
things += ("red circle", "blue circle", "grinning face", "crying face")
captions = [f"{thing}, flat {style} style" for thing in things for style in ("Noto", "Twemoji")]

teacher = guided_distill.load("runs/imported/teacher")
asked = [captions[number % len(captions)] for number in range(pictures)]
drawn = teacher.sample(prompts=asked, w=1.0, num_steps=8)
np.savez("data/drawn.npz", image=np.uint8(127.5 * (drawn + 1)), caption=asked)

# %%
# !guided-distill encode --data npz:data/drawn.npz --image_size 32 --out data/drawn --autoencoder runs/imported/companions/vae --text_encoder companions:runs/imported/companions

# %% [markdown]
# ## Distill
#
# The config names the data and the network in the folder, and overrides some defaults. With
# `start_from`, no teacher is trained. Stage one distills the two calls per step into one network
# conditioned on $w$; one round of stage two then halves 8 steps to 4. This notebook makes few updates;
# thousands would bring the student closer to its teacher.

# %%
# %%writefile emoji_distilled.py
from guided_distill.config import default_config


def get_config(variant=""):
    config = default_config()
    config.data.name = "encoded:data/drawn"
    config.start_from = "runs/imported/teacher"
    config.model.name = "sd_unet"
    config.model.schedule = "scaled_linear"
    config.model.schedule_options = {"beta_start": 0.00085, "beta_end": 0.012}
    config.model.options = {
        "block_out_channels": (64, 128),
        "cross_attention_levels": (1,),
        "num_attention_heads": (2, 4),
        "layers_per_block": 1,
        "cross_attention_dim": 384,
        "norm_num_groups": 8,
    }
    config.guidance.w_max = 6.0
    config.guidance.weighting = "snr_plus_one"
    config.halving.first_num_steps = config.halving.last_num_steps = 4
    for stage in (config.guidance, config.halving):
        stage.batch_size = 16
        stage.learning_rate = 3e-4
        stage.learning_rate_schedule = "cosine"
    config.steps_per_dispatch = 1
    config.log_every = 20
    return config


# %%
# !guided-distill train --config emoji_distilled.py --workdir runs/distilled --config.guidance.steps={updates[0]} --config.halving.steps={updates[1]}

# %% [markdown]
# ## Look
#
# Every row starts from the same noise. This small teacher loses little with only four steps, of two
# calls each; the student makes one call per step. The effect of the short training is visible: the
# student's colours are stronger than its teacher's.

# %%
# %matplotlib inline
from guided_distill.report.figures import image_rows

w, seed = 2.0, 1
student = guided_distill.load("runs/distilled/halving_ddim_4")
shown = captions[::2]

ours = student.sample(prompts=shown, w=w, seed=seed)
rows = {
    "teacher, 16 x 2 calls": teacher.sample(prompts=shown, w=w, seed=seed, num_steps=16),
    "teacher, 4 x 2 calls": teacher.sample(prompts=shown, w=w, seed=seed, num_steps=4),
    "student, 4 calls": ours,
}
image_rows(rows)

# %% [markdown]
# ## Export to diffusers
#
# `export` writes the student as a folder for diffusers. Its README states the number of steps and the
# guidance scales that the student was trained for.

# %%
# !guided-distill export --workdir runs/distilled --stages halving_ddim_4 --format diffusers --out student_folder

# %% [markdown]
# In the next cell, everything but the noise comes from diffusers. The hook counts the calls to the
# U-Net.

# %%
from guided_distill.sampling.sample import initial_noise

if all(map(importlib.util.find_spec, ("diffusers", "torch", "transformers"))):
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    pipeline = StableDiffusionPipeline.from_pretrained("student_folder")
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    noise = initial_noise(student.about, len(shown), seed=seed)
    theirs = pipeline(
        shown,
        num_inference_steps=4,
        guidance_scale=1 + w,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
    ).images
    rows["the same in diffusers"] = 2 * theirs - 1
    difference = np.abs(rows["the same in diffusers"] - ours).max() * 127.5
    print(f"{len(calls)} calls of the U-Net; pixels differ by at most {difference:.2f} of 255")
else:
    print("pip install diffusers torch transformers, and this cell draws them there too.")

# %%
image_rows({name: row for name, row in rows.items() if "teacher" not in name})

# %% [markdown]
# ## Next
#
# `docs/stable_diffusion.md` shows the same steps with Stable Diffusion, and adds editing and
# in-painting. `configs/emoji.py` trains a model such as this one from scratch.
