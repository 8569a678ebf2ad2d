"""Exports one student as a standalone program: `guided-distill export --format stablehlo`."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from guided_distill.diffusion import samplers
from guided_distill.diffusion.guidance import Condition
from guided_distill.errors import UserError
from guided_distill.formats.card import evidence_of, write_card
from guided_distill.formats.exporting import load_one_stage, new_folder
from guided_distill.runs.trained import Description, Trained
from guided_distill.sampling.programs import Inputs, run_sampler
from guided_distill.storage import write_bytes, write_text

PLATFORMS = ("cpu", "cuda", "tpu")
SCRIPT = "run_stablehlo.py"


def export_stablehlo(
    workdir: epath.Path,
    out: epath.Path,
    *,
    stages: Sequence[str] | None = None,
    repository: str | None = None,
) -> list[epath.Path]:
    """Write a student's N-step sampler to the new folder `out`, serialized by jax.export.

    sampler.stablehlo: f(weights, seed uint32, condition [B, ...] each, w [B]) -> [B, *data_shape], for
    any B on PLATFORMS. Row i equals row i of `sample` with that seed; a latent model's rows are latents.
    weights.safetensors: the first argument. about.json: what the student was trained for. SCRIPT draws
    samples, and README.md explains it. stages: the folder of the stage; None for the last finished one.
    repository: the one on a hub that the folder is for.

    Returns `out` in a list. Raises UserError for a stage that isn't a student conditioned on w, for an
    encoder, and as `load_one_stage`.
    """
    trained = load_one_stage(workdir, out, stages)
    about = trained.description
    if about.w_min is None or about.num_steps is None or about.sampler == samplers.ENCODE:
        raise UserError(
            f"{trained.path} is not a student that is conditioned on w and samples: name a halving round "
            f"with --stages"
        )
    weights = {
        name: np.asarray(leaf) for name, leaf in flatten_dict(trained.params, sep="/").items()
    }
    program = export_sampler(about, weights)
    script = importlib.resources.files("guided_distill.formats") / SCRIPT
    with new_folder(out) as folder:
        write_bytes(folder / "sampler.stablehlo", bytes(program.serialize()))
        write_bytes(folder / "weights.safetensors", safetensors.numpy.save(weights))
        write_text(folder / "about.json", json.dumps(_facts(about), indent=2))
        write_bytes(folder / SCRIPT, script.read_bytes())
        _write_card(trained, folder, repository)
    return [out]


def export_sampler(about: Description, weights: Mapping[str, np.ndarray]) -> export.Exported:
    """The program, with a symbolic batch size B."""
    network, num_steps = about.network(), jnp.int32(about.num_steps)

    def draw(
        weights: Mapping[str, jax.Array], seed: jax.Array, condition: Condition, w: jax.Array
    ) -> jax.Array:
        key, indices = jax.random.key(seed), jnp.arange(w.shape[0])
        drawn = run_sampler(
            network,
            str(about.sampler),
            unflatten_dict(dict(weights), sep="/"),
            Inputs(
                samplers.initial_noise(key, indices, about.data_shape),
                samplers.step_keys(key, indices),
                condition,
                null=None,
                known=None,
                w=w,
                num_steps=num_steps,
                first=num_steps,
            ),
            clipped=network.of_images,
        )
        return jnp.clip(drawn, -1.0, 1.0) if network.of_images else drawn

    (count,) = export.symbolic_shape("B")
    shapes = {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in weights.items()}
    condition = {
        name: jax.ShapeDtypeStruct((count, *shape), jnp.int32 if name == "label" else jnp.float32)
        for name, shape in about.condition_shapes.items()
    }
    seed, w = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((count,), jnp.float32)
    return export.export(jax.jit(draw), platforms=PLATFORMS)(shapes, seed, condition, w)


def _write_card(trained: Trained, folder: epath.Path, repository: str | None) -> None:
    about = trained.description
    assert about.w_min is not None
    assert about.w_max is not None
    write_card(
        folder,
        "stablehlo_card",
        evidence_of([epath.Path(trained.path)]),
        about=about,
        repository=repository,
        labels=list(about.condition_shapes) == ["label"],
        platforms=PLATFORMS,
        script=SCRIPT,
        w=min(max(1.0, about.w_min), about.w_max),
    )


def _facts(about: Description) -> dict[str, object]:
    return {
        "num_steps": about.num_steps,
        "sampler": about.sampler,
        "w_min": about.w_min,
        "w_max": about.w_max,
        "data_shape": about.data_shape,
        "condition_shapes": dict(about.condition_shapes),
        "num_classes": len(about.class_names),
        "class_names": about.class_names,
        "latent": about.latent,
        "platforms": PLATFORMS,
        "package_version": about.package_version,
    }
