# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Your own images
#
# All you need for training is a folder of images with one sub-folder per class. This notebook first
# draws a small folder of shapes, so that you can run it without images of your own. It takes a few
# minutes on two CPU cores.

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
images = "shapes"  # Or the path of your own folder.

# %% [markdown]
# ## The folder
#
# This cell writes PNG files of 64 x 64 pixels to `shapes/disc/`, `shapes/square/` and
# `shapes/triangle/`. If you use your own images, skip it. PNG, JPEG, WebP and BMP files of any size
# work; they are cropped to squares and resized.

# %%
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

random = np.random.default_rng(0)


def corners(kind, size):
    """Return the corners of a shape near the middle of 64 x 64 pixels; a disc has 60 corners."""
    count = {"disc": 60, "square": 4, "triangle": 3}[kind]
    turn = 2 * np.pi * (np.arange(count) / count) - np.pi * {"square": 0.25}.get(kind, 0.5)
    middle = random.uniform(28, 36, size=2)
    return [tuple(middle + size * np.array([np.cos(angle), np.sin(angle)])) for angle in turn]


for kind in ("disc", "square", "triangle"):
    folder = Path("shapes") / kind
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(300):
        picture = Image.new("RGB", (64, 64), "white")
        colour = tuple(int(each) for each in random.integers(0, 200, size=3))
        ImageDraw.Draw(picture).polygon(corners(kind, random.uniform(14, 26)), fill=colour)
        picture.save(folder / f"{number:03}.png")

# %% [markdown]
# ## Train
#
# `data.name` is the place of the images, and `data.image_size` the size to which they are resized.
# The network of `configs/digits.py` and a few updates are enough for 8 x 8 pixels. For photographs,
# start from `configs/photo10.py:unet` or `configs/cifar10.py`, with a GPU and many thousands of
# images.

# %%
fewer = {
    "": "--config.teacher.steps=1500 --config.guidance.steps=1000 "
    "--config.halving.steps=250 --config.halving.first_num_steps=4",
    "runlocal": "--config.halving.first_num_steps=4",
}[variant]

# %%
# !guided-distill train --config configs/digits.py:{variant} --workdir runs/shapes --config.data.name=folder:{images} --config.data.image_size=8 {fewer}

# %% [markdown]
# ## Sample
#
# The command writes a picture and an `.npz` file to `samples/`. For a report of the whole run, run
# `guided-distill evaluate --workdir runs/shapes` and then `guided-distill report --workdir
# runs/shapes`.

# %%
# !guided-distill sample --workdir runs/shapes --stage halving_ddim_4 --w 1 --num 15 --out samples

# %% [markdown]
# ## In Python
#
# The classes are named after the sub-folders. The top row shows real images; below it are the teacher
# and its students, which start from the same noise.

# %%
# %matplotlib inline
from etils import epath

import guided_distill
from guided_distill.data.images import read_images
from guided_distill.report.figures import image_rows

teacher = guided_distill.load("runs/shapes/teacher")
names = teacher.about.class_names
labels = [name for name in names for _ in range(5)]
folders = [epath.Path(images) / name for name in names]
real = [read_images(folder, shape=(8, 8, 3), limit=5) for folder in folders]

rows = {
    "real": np.concatenate(real),
    "teacher, 64 x 2 calls": teacher.sample(labels=labels, w=1.0, num_steps=64),
}
for n in (4, 2, 1):
    student = guided_distill.load(f"runs/shapes/halving_ddim_{n}")
    rows[f"student, {n} call{'s' if n > 1 else ''}"] = student.sample(labels=labels, w=1.0)
image_rows(rows)

# %% [markdown]
# `guided-distill export --workdir runs/shapes --out weights` exports the weights, and
# `guided-distill train --help` shows how to override every key of the config.
