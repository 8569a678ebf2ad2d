# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Sampling playground
#
# Try the controls of a trained student: guidance weight, steps, seed and digit. If you read this
# without running it, the picture at the end shows their effects.

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
import importlib.util

if importlib.util.find_spec("ipywidgets") is None:
    print("Installing ipywidgets ...")
    # %pip install -q ipywidgets

# %% [markdown]
# This notebook uses the run of `01_distill_digits`. If that run is already trained, the command
# returns at once.

# %%
variant = ""  # "runlocal" makes everything tiny.

fewer = {
    "": "--config.teacher.steps=1500 --config.guidance.steps=1500 "
    "--config.halving.steps=300 --config.halving.first_num_steps=8",
    "runlocal": "--config.halving.first_num_steps=4",
}[variant]

# %%
# !guided-distill train --config configs/digits.py:{variant} --workdir runs/digits {fewer}

# %%
# %matplotlib inline
import guided_distill
from guided_distill.pictures import image_grid
from guided_distill.report.figures import image_rows

students = {n: guided_distill.load(f"runs/digits/halving_ddim_{n}") for n in (1, 2, 4)}


def draw(w, steps, seed, digit):
    """Return ten images of a digit, float32 [10, 8, 8, 1]."""
    return students[steps].sample(labels=[digit] * 10, w=w, seed=seed)


# %% [markdown]
# ## The controls
#
# The student calls its network `steps` times; each number of steps is a separate student. The same
# seed gives the same noise, whatever the other controls are set to.

# %%
import io

from ipywidgets import FloatSlider, Image, IntSlider, SelectionSlider, VBox

knobs = {
    "w": FloatSlider(1.0, min=0.0, max=4.0, step=0.25, description="w"),
    "steps": SelectionSlider(options=[1, 2, 4], value=4, description="steps"),
    "seed": IntSlider(0, min=0, max=99, description="seed"),
    "digit": IntSlider(3, min=0, max=9, description="digit"),
}
picture = Image(format="png")


def redraw(_=None):
    """Draw the images for the current values of the knobs."""
    images = draw(**{name: knob.value for name, knob in knobs.items()})
    file = io.BytesIO()
    image_grid(images, columns=10, scale=8).save(file, format="png")
    picture.value = file.getvalue()


for knob in knobs.values():
    knob.observe(redraw, names="value")
redraw()
VBox([*knobs.values(), picture])

# %% [markdown]
# ## What the controls do
#
# The first row shows images of the 4-step student; each row below changes one control.

# %%
image_rows(
    {
        "w = 1, 4 steps, seed 0": draw(w=1.0, steps=4, seed=0, digit=3),
        "w = 0": draw(w=0.0, steps=4, seed=0, digit=3),
        "w = 4": draw(w=4.0, steps=4, seed=0, digit=3),
        "1 step": draw(w=1.0, steps=1, seed=0, digit=3),
        "seed 1": draw(w=1.0, steps=4, seed=1, digit=3),
        "digit 8": draw(w=1.0, steps=4, seed=0, digit=8),
    }
)
