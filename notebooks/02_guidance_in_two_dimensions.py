# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Guidance in two dimensions
#
# What does the guidance weight $w$ do to a distribution? With points in the plane, you can see it.
# For a mixture of Gaussians the optimal denoiser is known in closed form, so every trained network
# can be compared with the exact answer. This notebook takes a few minutes on two CPU cores.

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
# ## Train a teacher, and distill it
#
# One command trains the teacher, the stage-one student, and the students with 8, 4, 2 and 1 steps.
# They see only points and their classes, not the closed form below.

# %%
variant = ""  # "runlocal" makes everything tiny.

fewer = {
    "": "--config.teacher.steps=1500 --config.guidance.steps=1500 "
    "--config.halving.steps=400 --config.halving.first_num_steps=8",
    "runlocal": "--config.halving.first_num_steps=4",
}[variant]

# %%
# !guided-distill train --config configs/mixture2d.py:{variant} --workdir runs/mixture2d {fewer} --config.halving.samplers="('ddim',)"

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from guided_distill.data.mixture import DEFAULT_MIXTURE as mixture
from guided_distill.diffusion.guidance import Denoiser, with_guidance
from guided_distill.diffusion.process import ddim_step, prediction_from
from guided_distill.diffusion.schedules import SCHEDULES, alpha_sigma
from guided_distill.sampling.labels import cycling_labels, of_labels

schedule = SCHEDULES["cosine"]()
weights = (0.0, 1.0, 3.0)
colours = np.array(["tab:blue", "tab:orange", "tab:green", "tab:red"])

# %% [markdown]
# ## The exact answer
#
# Each of the four classes is an arm of a pinwheel, a mixture of three Gaussians. With $z = \alpha x
# + \sigma\epsilon$, the mean of $x$ given $z$ is a weighted sum of Gaussian means, whether or not
# the class $c$ is known. The guided denoiser $(1 + w)\,\mathrm{E}[x|z, c] - w\,\mathrm{E}[x|z]$ is
# therefore known exactly, and so is the point to which it takes each noise sample.


# %%
def predict(z, t, condition, w):
    log_snr = schedule(t)
    x = mixture.denoise(z, *alpha_sigma(log_snr), condition["label"])
    return prediction_from(x, source="x", z=z, log_snr=log_snr)


exact = with_guidance(Denoiser(predict, guided=False, null={"label": mixture.num_classes}))


def flow(denoiser, z, labels, *, w, num_steps):
    """Return the path of points [n, 2] from noise to data: [num_steps + 1, n, 2]."""

    @jax.jit
    def step(z, t, s):
        t, s, weight = (jnp.full(len(z), value) for value in (t, s, w))
        return ddim_step(denoiser.predict(z, t, of_labels(labels), weight), schedule(s))

    path = [z]
    for i in range(num_steps, 0, -1):
        path.append(step(path[-1], i / num_steps, (i - 1) / num_steps))
    return np.stack(path)


labels = cycling_labels(800, mixture.num_classes)
noise = np.random.default_rng(0).standard_normal((len(labels), 2), np.float32)
exact_points = {w: flow(exact, noise, labels, w=w, num_steps=256)[-1] for w in weights}

# %% [markdown]
# At each noise level, the guided denoiser climbs the density $p(z|c)^{1+w} / p(z)^w$. The top row
# shows this density for the blue class, at a low noise level: a larger $w$ pushes it away from the
# other classes. The bottom row shows where the exact guided flow takes points of all four classes:
# $w = 0$ gives the data; a larger $w$ separates the classes and narrows them.

# %%
side = np.linspace(-1.1, 1.1, 150, dtype=np.float32)
grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
level = alpha_sigma(schedule(jnp.full(len(grid), 0.1)))
log_any = mixture.log_density(grid, *level, jnp.full(len(grid), mixture.num_classes))
log_one = mixture.log_density(grid, *level, jnp.zeros(len(grid), int))


def plain(axes, *, title="", name=""):
    axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title)
    axes.set_ylabel(name)


figure, panels = plt.subplots(2, 3, figsize=(7, 4.8), layout="constrained")
for (above, below), w in zip(panels.T, weights, strict=True):
    log_guided = np.asarray((1 + w) * log_one - w * log_any).reshape(150, 150)
    above.contourf(side, side, np.exp(log_guided - log_guided.max()), levels=12, cmap="Blues")
    below.scatter(*exact_points[w].T, c=colours[labels], s=2)
    plain(above, title=f"w = {w:g}", name="density of the blue class" if w == 0 else "")
    plain(below, name="exact points" if w == 0 else "")

# %% [markdown]
# ## The networks' answer
#
# All networks start from the same noise, so each point corresponds to one point in every other
# picture. The number in the corner is the root mean square distance between the points and where the
# exact flow takes them (an arm is about 0.6 long).

# %%
import guided_distill


def points_of(stage, **request):
    model = guided_distill.load(f"runs/mixture2d/{stage}")
    return {w: model.sample(labels=labels, w=w, noise=noise, **request) for w in weights}


points = {
    "exact": exact_points,
    "teacher\n64 x 2 calls": points_of("teacher", num_steps=64),
    "stage one\n64 calls": points_of("guidance", num_steps=64),
    "student\n4 calls": points_of("halving_ddim_4"),
    "student\n2 calls": points_of("halving_ddim_2"),
    "student\n1 call": points_of("halving_ddim_1"),
}
figure, panels = plt.subplots(3, 6, figsize=(9, 4.9), layout="constrained")
for column, (name, of_weight) in zip(panels.T, points.items(), strict=True):
    for axes, w in zip(column, weights, strict=True):
        axes.scatter(*of_weight[w].T, c=colours[labels], s=1)
        plain(axes, title=name if w == 0 else "", name=f"w = {w:g}" if name == "exact" else "")
        if name != "exact":
            apart = np.sqrt(np.mean(np.sum((of_weight[w] - exact_points[w]) ** 2, axis=-1)))
            axes.text(-1.05, -1.05, f"{apart:.3f}", fontsize=9)

# %% [markdown]
# After such a short training run, the teacher's arms are thinner than the exact ones, especially at
# a large $w$, which amplifies its errors. The stage-one student inherits these errors. Fewer steps
# add some error at $w = 0$ and $w = 1$; at $w = 3$, only the teacher's own errors are visible.

# %% [markdown]
# ## Watch them flow
#
# The animation shows points on their way from noise to data at $w = 3$: with the exact flow in 40
# steps, and with the student in 4 jumps.

# %%
from pathlib import Path

from IPython.display import Image
from matplotlib.animation import FuncAnimation, PillowWriter

student = guided_distill.load("runs/mixture2d/halving_ddim_4").trained
few = slice(0, 240)
paths = {
    "exact, 40 steps": flow(exact, noise[few], labels[few], w=3.0, num_steps=40),
    "student, 4 steps": flow(
        student.description.network().denoiser(student.params),
        noise[few],
        labels[few],
        w=3.0,
        num_steps=4,
    ),
}
figure, panels = plt.subplots(1, 2, figsize=(6, 3.2), layout="constrained")
dots = []
for axes, name in zip(panels, paths, strict=True):
    dots.append(axes.scatter([], [], s=5))
    plain(axes, title=name)
    axes.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))


def draw(done):
    """Draw the points after a fraction `done` of their path."""
    for scatter, path in zip(dots, paths.values(), strict=True):
        scatter.set_offsets(path[int(done * (len(path) - 1))])
        scatter.set_color(colours[labels[few]])
    return dots


shares = [*np.linspace(0, 1, 17), *[1.0] * 6]
FuncAnimation(figure, draw, frames=shares).save("flow.gif", PillowWriter(fps=6), dpi=60)
plt.close(figure)
Image(Path("flow.gif").read_bytes(), format="gif")
