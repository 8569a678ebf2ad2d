# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # From 128 network calls to one
#
# A diffusion model with classifier-free guidance calls its network twice per step, for dozens of
# steps. This notebook trains such a model on small handwritten digits and distills it into students
# that need 4, 2 and 1 network calls and still take the guidance weight $w$ as an input. It takes a
# few minutes on two CPU cores.

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

# %% [markdown]
# ## The idea
#
# **Stage one** trains one network, conditioned on $w$, to predict in one call what the teacher
# predicts with two:
#
# $$\hat x_w = (1 + w)\,\hat x(z, c) - w\,\hat x(z)$$
#
# Here $z$ is the noisy image, $c$ its class, and $\hat x$ the network's prediction of the clean
# image. $w = 0$ is the plain conditional model. The `guidance_scale` of Stable Diffusion and
# diffusers is $1 + w$.
#
# **Stage two** is progressive distillation: it halves the number of steps, round by round. Two DDIM
# steps of the teacher lead from $z_t$ to $z_s$. The student learns the single prediction that leads
# there in a single step:
#
# $$\tilde x = \frac{z_s - q\,z_t}{\alpha_s - q\,\alpha_t}, \qquad q = \frac{\sigma_s}{\sigma_t}$$
#
# The student of one round is the teacher of the next. $w$ remains an input throughout.

# %% [markdown]
# ## Train
#
# One command trains the teacher, the stage-one student, and the students with 8, 4, 2 and 1 steps.
# You can interrupt it at any time; the same command resumes. To save time, this notebook overrides
# the numbers of updates in `configs/digits.py`; without these overrides, the students get closer to
# their teacher.

# %%
variant = ""  # "runlocal" makes everything tiny.

fewer = {
    "": "--config.teacher.steps=1500 --config.guidance.steps=1500 "
    "--config.halving.steps=300 --config.halving.first_num_steps=8",
    "runlocal": "--config.halving.first_num_steps=4",
}[variant]
samples = 16 if variant else 512

# %%
# !guided-distill train --config configs/digits.py:{variant} --workdir runs/digits {fewer}

# %% [markdown]
# ## Measure
#
# `evaluate` draws samples from every stage and compares them with the training data, in the features
# of a small classifier that it trains first. Fréchet distances decrease as the number of samples
# grows, so distances from a few hundred samples are comparable only with each other.

# %%
# !guided-distill evaluate --workdir runs/digits --num_samples {samples} --num_steps 1,2,4,8,64 --w 0,1,4

# %% [markdown]
# ## Look
#
# Every row has the same seed and the same digits. In the first row, the teacher takes 64 steps with
# two calls each; with 2 steps, its samples are worse, and the curves below show by how much. The
# students start from the same noise, so each image corresponds to those above it.

# %%
# %matplotlib inline
import guided_distill
from guided_distill.report.figures import image_rows

teacher = guided_distill.load("runs/digits/teacher")
students = {n: guided_distill.load(f"runs/digits/halving_ddim_{n}") for n in (4, 2, 1)}
digits = list(range(10))

rows = {
    "teacher, 64 x 2 calls": teacher.sample(labels=digits, w=1.0, num_steps=64),
    "teacher, 2 x 2 calls": teacher.sample(labels=digits, w=1.0, num_steps=2),
}
for n, student in students.items():
    rows[f"student, {n} call{'s' if n > 1 else ''}"] = student.sample(labels=digits, w=1.0)
image_rows(rows)

# %% [markdown]
# ## Change the guidance weight
#
# The rows show one student, one seed and four weights. A larger $w$ gives clearer digits that are
# more alike.

# %%
twos_and_eights = [2] * 6 + [8] * 6
image_rows({f"w = {w}": students[4].sample(labels=twos_and_eights, w=w) for w in (0, 1, 2, 4)})

# %% [markdown]
# ## Quality against steps

# %%
from etils import epath

from guided_distill.evaluation.results import read_results
from guided_distill.report.figures import quality_figure

results = read_results(epath.Path("runs/digits/results.csv"))
quality_figure(results)

# %% [markdown]
# The teacher gets worse as its number of steps decreases. The students stay near the level of the
# many-step teacher. A one-step student loses diversity at $w = 0$: see `recall` below. Accuracy alone
# is misleading: the classifier recognises all digits of the one-step teacher, but they have no
# variety at all.

# %%
print("stage      steps    w  distance  recall  accuracy")
for row in results:
    if row.stage != "real" and row.num_steps in (1, 4, 64):
        print(
            f"{row.stage:10} {row.num_steps:5} {row.w:4g} {row.fd:9.3f} {row.recall:7.2f} "
            f"{row.accuracy:9.3f}"
        )

# %% [markdown]
# ## Next
#
# `guided-distill report --workdir runs/digits` writes all of this on one page.
# `02_guidance_in_two_dimensions` shows what $w$ does where the exact answer is known, and
# `03_your_own_images` trains on a folder of your images.
