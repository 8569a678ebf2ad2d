"""The configs at the paper's scale: traced whole, without an array of theirs."""

import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from guided_distill import config
from guided_distill.errors import UserError
from guided_distill.models.outline import Outline
from guided_distill.runs.trained import network_of
from guided_distill.stages import all_stages, compiled_step
from guided_distill.training.state import initial_state

FOLDER = Path(__file__).parents[1] / "configs"
SIZES = {"cifar10": (32, 10), "imagenet64": (64, 1000)}


def read(name, variant=""):
    return config.parse(runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](variant))


def network(name):
    size, num_classes = SIZES[name]
    return network_of(read(name).model, Outline((size, size, 3), num_classes))


def count(network):
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Salimans & Ho's has 60.0 million; the labels' embeddings are the difference.
        ("cifar10", 60_015_363),
        # Dhariwal & Nichol's of these sizes has 296 million.
        ("imagenet64", 295_900_035),
    ],
)
def test_teachers_have_the_papers_size(name, expected):
    teacher = network(name)
    assert count(teacher) == expected
    width, embedding = (read(name).model.options[key] for key in ("width", "embedding_width"))
    w_embedding = (width + 1) * embedding + (embedding + 1) * embedding
    assert count(teacher.conditioned_on_w()) == expected + w_embedding


LATENT = {
    # (data_shape, condition, num_classes) of the config and the parameters of its teacher.
    "sd15_laion512": ((64, 64, 4), {"text": (77, 768)}, 0, 859_520_964),
    "sd21_laion768": ((96, 96, 4), {"text": (77, 1024)}, 0, 865_910_724),
    "sd_inpaint": (
        (64, 64, 4),
        {"text": (77, 768), "inpaint": (64, 64, 5)},
        0,
        859_535_364,
    ),
    "ldm_imagenet256": ((64, 64, 3), {"label": ()}, 1000, 400_920_579 + 1001 * 512),
    "dit_imagenet256": ((32, 32, 4), {"label": ()}, 1000, 749_826_464),
}


@pytest.mark.parametrize("name", LATENT)
def test_teachers_of_latents_have_the_published_size(name):
    shape, condition, num_classes, expected = LATENT[name]
    teacher = network_of(read(name).model, Outline(shape, num_classes, condition, latent=True))
    assert count(teacher) == expected
    assert count(teacher.conditioned_on_w()) > expected
    assert not teacher.of_images


def test_rounds_in_latent_space_add_up_to_what_they_were_priced_at():
    experiment = read("sd15_laion512")
    rounds = experiment.halving.rounds()
    assert (rounds[0], rounds[-1]) == (256, 1)
    assert sum(map(experiment.halving.updates, rounds)) == 85_000
    assert (experiment.guidance.w_min, experiment.guidance.w_max) == (2.0, 14.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cifar10", "teacher"), ("imagenet64", "guidance"), ("imagenet64", "halving")],
)
def test_every_stage_fits_together(name, kind, mesh_of):
    experiment, teacher = read(name), network(name)
    stage = next(each for each in all_stages(experiment) if each.kind == kind)
    student = teacher if kind == "teacher" else teacher.conditioned_on_w()
    tutor = student if kind == "halving" else teacher
    step, optimizer = compiled_step(stage, student=student, teacher=tutor, mesh=mesh_of(1))

    def update(image, label):
        key = jax.random.key(0)
        state = initial_state(student.init(key), optimizer, ema_decay=stage.settings.ema_decay)
        frozen = {"params": tutor.init(key), "num_steps": jnp.asarray(512, jnp.int32), "null": None}
        return step(state, frozen, {"image": image, "label": label}, key)

    batch = (1, stage.settings.batch_size)
    state, _ = jax.eval_shape(
        update,
        jax.ShapeDtypeStruct((*batch, *teacher.data_shape), jnp.float32),
        jax.ShapeDtypeStruct(batch, jnp.int32),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert bool(state.ema) == (kind != "halving")


def test_rounds_go_from_the_papers_teacher_to_one_step():
    for name in SIZES:
        experiment = read(name)
        assert experiment.halving.rounds() == tuple(2**k for k in range(9, -1, -1))
        steps = {n: experiment.halving.updates(n) for n in experiment.halving.rounds()}
        assert (steps[512], steps[4], steps[2], steps[1]) == (50_000, 50_000, 100_000, 100_000)


@pytest.mark.parametrize("name", [*SIZES, *LATENT, "cifar10_small", "emoji"])
@pytest.mark.parametrize("small", ["", ",runlocal"])
def test_baselines_keep_what_the_shared_teacher_was_trained_with(name, small):
    main = read(name, small.strip(","))
    for baseline, method in (
        ("single_w", "guided"),
        ("naive", "naive"),
        ("two_student", "two_student"),
    ):
        experiment = read(name, baseline + small)
        assert experiment.method == method
        assert (experiment.model, experiment.data) == (main.model, main.data)
        assert experiment.teacher == main.teacher
        assert experiment.halving.samplers == ("ddim",)
        at_one_w = experiment.guidance.w_min == experiment.guidance.w_max
        assert at_one_w == (baseline != "two_student")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_unknown_variants_are_named(file):
    with pytest.raises(UserError, match=r"no variant 'runlocl'; choose from .*runlocal"):
        read(file.stem, "runlocl")
