"""Samples from weights: what they may depend on, and what is refused."""

import jax
import numpy as np
import pytest

from guided_distill.config import parse
from guided_distill.errors import UserError
from guided_distill.sampling import compiled_sampler, cycling_labels, sample
from guided_distill.training.trained import Description, Trained

OPTIONS = {"width": 16, "depth": 1, "embedding_width": 16}


def trained(stage, *, num_steps=None, sampler=None):
    """A checkpoint's content with random weights, none of them zero."""
    description = Description(
        stage=stage,
        total_steps=1,
        num_steps=num_steps,
        sampler=sampler,
        w_min=None if stage == "teacher" else 0.0,
        w_max=None if stage == "teacher" else 4.0,
        data_shape=(2,),
        class_names=("0", "1", "2"),
        teacher=None,
        package_version="0",
        experiment=parse({"model": {"name": "mlp", "options": OPTIONS}}),
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(description.network().init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes
    )
    return Trained(path="", step=1, params=params, description=description)


STUDENT = trained("halving", num_steps=2, sampler="stochastic")


def test_a_sample_depends_neither_on_the_batch_nor_on_its_size():
    labels = cycling_labels(19, 3)
    whole, parts = (sample(STUDENT, labels=labels, w=1.0, batch_size=size) for size in (32, 8))
    assert whole.shape == (19, 2)
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    assert len(np.unique(whole.round(3), axis=0)) == 19


@pytest.mark.parametrize("who", [trained("teacher"), STUDENT], ids=["teacher", "student"])
def test_devices_make_no_difference(who, mesh_of):
    about = who.description
    sampler = about.sampler or "ddim"
    arguments = (
        who.params,
        jax.random.key(0),
        np.arange(8),
        cycling_labels(8, 3),
        np.linspace(0, 4, 8, dtype=np.float32),
        np.int32(2),
    )
    one, two, four = (
        np.asarray(compiled_sampler(about.network(), sampler, mesh_of(count))(*arguments))
        for count in (1, 2, 4)
    )
    np.testing.assert_allclose(two, one, atol=1e-4)
    np.testing.assert_allclose(four, one, atol=1e-4)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"num_steps": 4}, "trained for 2 steps"),
        ({"num_steps": 1}, "trained for 2 steps"),
        ({"sampler": "ddim"}, "trained for 2 steps"),
        ({"num_steps": 0, "allow_untrained": True}, "at least 1 step"),
        ({"w": 4.5}, "outside the range"),
        ({"w": -0.5}, "outside the range"),
        ({"labels": np.array([3])}, "--labels"),
    ],
)
def test_what_was_not_trained_is_refused(request_, said):
    with pytest.raises(UserError, match=said):
        sample(STUDENT, **{"labels": np.array([0]), "w": 1.0, **request_})
