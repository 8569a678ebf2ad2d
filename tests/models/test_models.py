"""What every network must keep to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.errors import UserError
from guided_distill.models.registry import build_network, student_params
from guided_distill.models.transformer import from_patches, to_patches

OPTIONS = {
    "mlp": {"width": 16, "depth": 2, "embedding_width": 8},
    "transformer": {
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "patch_size": 2,
        "embedding_width": 8,
    },
    "unet": {
        "width": 8,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (2,),
        "head_width": 8,
        "embedding_width": 8,
    },
}
SHAPE = (4, 4, 1)


def make(name, dtype="float32", options=None):
    return build_network(
        name=name,
        options=OPTIONS[name] if options is None else options,
        parameterization="v",
        schedule="cosine",
        dtype=dtype,
        data_shape=SHAPE,
        num_classes=3,
    )


def shaken(params):
    """Weights with every zero-initialised one moved, so that nothing is hidden by a zero."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return tree.unflatten(
        [
            leaf + 0.2 * jax.random.normal(key, leaf.shape)
            for leaf, key in zip(leaves, keys, strict=True)
        ]
    )


@partial(jax.jit, static_argnums=0)
def jitted(network, params, *inputs):
    return network.denoiser(params).predict(*inputs)


def inputs():
    z = jax.random.normal(jax.random.key(1), (4, *SHAPE))
    return z, jnp.array([0.9, 0.5, 0.3, 0.1]), jnp.array([0, 1, 2, 3])


@pytest.mark.parametrize("name", OPTIONS)
def test_student_starts_as_its_conditional_teacher_at_every_w(name):
    network = make(name)
    student = network.told_w()
    params = shaken(network.init(jax.random.key(0)))
    start = student_params(student.init(jax.random.key(1)), params)
    z, t, label = inputs()
    w = jnp.array([0.0, 1.0, 2.5, 4.0])

    # Op by op, not compiled: two programs would round the time embedding's large angles differently.
    expected = network.denoiser(params).predict(z, t, label, None)
    found = student.denoiser(start).predict(z, t, label, w)
    np.testing.assert_allclose(found.x, expected.x, atol=1e-6)

    @jax.jit
    @jax.grad
    def gradient_of(params):
        return jnp.sum(jnp.square(student.denoiser(params).predict(z, t, label, w).x))

    gradient = gradient_of(start)
    assert np.abs(gradient["conditioning"]["w"]["output"]["kernel"]).max() > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_output_depends_on_every_input(name):
    student = make(name).told_w()
    params = shaken(student.init(jax.random.key(0)))
    z, t, label = inputs()
    w = jnp.arange(4.0)
    base = jitted(student, params, z, t, label, w).eps
    for changed in (
        (z.at[:, 0, 0].add(1.0), t, label, w),
        (z, t + 0.05, label, w),
        (z, t, (label + 1) % 4, w),
        (z, t, label, w + 1.0),
    ):
        moved = jitted(student, params, *changed).eps - base
        assert np.abs(moved).reshape(4, -1).max(axis=1).min() > 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16_computes_in_it_and_keeps_float32_weights_and_output(name):
    network = make(name, dtype="bfloat16")
    params = shaken(network.init(jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    z, t, label = inputs()
    low = jitted(network, params, z, t, label, None).x
    high = jitted(make(name), params, z, t, label, None).x
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - high).max() < 0.2 * np.abs(high).max()


def test_patches_return_and_are_local():
    image = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    patches = to_patches(image, 2)
    np.testing.assert_array_equal(from_patches(patches, image.shape[1:], 2), image)
    np.testing.assert_array_equal(patches[0, 1].reshape(2, 2, 3), image[0, :2, 2:4])


@pytest.mark.parametrize(
    ("options", "key"),
    [({"width": 16, "depth": 2}, "embedding_width"), ({**OPTIONS["mlp"], "wdth": 3}, "wdth")],
)
def test_bad_options_are_named(options, key):
    with pytest.raises(UserError, match=f"config.model.options.{key}"):
        make("mlp", options=options)


def test_students_of_another_shape_are_refused():
    wide = make("mlp", options={**OPTIONS["mlp"], "width": 32})
    with pytest.raises(ValueError, match="no place"):
        student_params(make("mlp").init(jax.random.key(0)), wide.init(jax.random.key(0)))
