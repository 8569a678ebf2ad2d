"""Properties that every network must have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.diffusion.schedules import cosine
from guided_distill.errors import UserError
from guided_distill.models.outline import Outline
from guided_distill.models.patches import from_patches, to_patches
from guided_distill.models.registry import apply_with_dropout, build_network, student_params

OPTIONS = {
    "dit": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
    "mlp": {"width": 16, "depth": 2, "embedding_width": 8},
    "sd_unet": {
        "block_out_channels": (8,),
        "cross_attention_levels": (0,),
        "num_attention_heads": (2,),
        "layers_per_block": 1,
        "cross_attention_dim": 6,
        "norm_num_groups": 2,
    },
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
W_PROJECTION = {
    "dit": ("w", "output", "kernel"),
    "sd_unet": ("time_embedding", "cond_proj", "kernel"),
}
"""The path of the projection of w, where it differs from that of `Conditioning`."""
SHAPE = (4, 4, 1)
KEY = jax.eval_shape(jax.random.key, 0)


def make(name, dtype="float32", options=None):
    return build_network(
        name=name,
        options=OPTIONS[name] if options is None else options,
        parameterization="v",
        schedule=cosine(),
        dtype=dtype,
        outline=Outline(SHAPE, 3),
    )


def random_params(network):
    """Weights without zeros, which could hide an error."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


@functools.partial(jax.jit, static_argnums=0)
def predict(network, params, *inputs):
    return network.denoiser(params).predict(*inputs)


def inputs():
    z = jax.random.normal(jax.random.key(1), (4, *SHAPE))
    return z, jnp.array([0.9, 0.5, 0.3, 0.1]), {"label": jnp.arange(4)}


@pytest.mark.parametrize("name", OPTIONS)
def test_student_starts_as_its_conditional_teacher_at_every_w(name):
    network = make(name)
    student = network.conditioned_on_w()
    teacher_params = random_params(network)
    # Keys of this kind compile much faster than the default.
    fresh = jax.jit(student.init)(jax.random.key(1, impl="unsafe_rbg"))
    start = flatten_dict(student_params(fresh, teacher_params))
    entry = W_PROJECTION.get(name, ("conditioning", "w", "output", "kernel"))
    projection = start.pop(entry)
    z, t, condition = inputs()
    w = jnp.array([0.0, 1.0, 2.5, 4.0])

    # Use one program: two would round the time embedding's large angles differently.
    @jax.jit
    def compare(teacher_params, start, projection):
        def found(projection):
            params = unflatten_dict({**start, entry: projection})
            return student.denoiser(params).predict(z, t, condition, w).x

        expected = network.denoiser(teacher_params).predict(z, t, condition, None).x
        return expected, *jax.jvp(found, (projection,), (jnp.ones_like(projection),))

    expected, found, slope = compare(teacher_params, start, projection)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(slope).reshape(4, -1).max(axis=1).min() > 1e-4


@pytest.mark.parametrize("name", OPTIONS)
def test_the_last_layer_keeps_its_weights_in_float32(name):
    network = make(name, "bfloat16")
    params = random_params(network)
    rounded = flatten_dict(network.rounded(params))
    head = network.module.head
    assert any(path[0] == head for path in rounded)
    for path, leaf in rounded.items():
        whole = path[0] == head or leaf.ndim == 1
        assert leaf.dtype == (jnp.float32 if whole else jnp.bfloat16)


@pytest.mark.parametrize("name", OPTIONS)
def test_output_depends_on_every_input(name):
    student = make(name).conditioned_on_w()
    params = random_params(student)
    z, t, condition = inputs()
    w = jnp.arange(4.0)
    base = predict(student, params, z, t, condition, w).eps
    for changed in (
        (z.at[:, 0, 0].add(1.0), t, condition, w),
        (z, t + 0.05, condition, w),
        (z, t, {"label": (condition["label"] + 1) % 4}, w),
        (z, t, condition, w + 1.0),
    ):
        moved = predict(student, params, *changed).eps - base
        assert np.abs(moved).reshape(4, -1).max(axis=1).min() > 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_a_scalar_w_enters_as_the_number_itself(name):
    student = make(name).conditioned_on_w("scalar")
    params = flatten_dict(random_params(student))
    entry = W_PROJECTION.get(name, ("conditioning", "w", "output", "kernel"))
    entry = tuple("hidden" if part == "output" else part for part in entry)
    w = jnp.array([0.5, 1.0, 2.5, 4.0])
    base = predict(student, unflatten_dict(params), *inputs(), w).x
    doubled = predict(student, unflatten_dict(params), *inputs(), 2 * w).x
    params[entry] /= 2
    np.testing.assert_allclose(
        predict(student, unflatten_dict(params), *inputs(), 2 * w).x, base, atol=1e-5
    )
    assert np.abs(doubled - base).reshape(4, -1).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bfloat16_network_keeps_float32_weights_and_output(name):
    student = make(name, dtype="bfloat16").conditioned_on_w()
    params = random_params(student)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    w = jnp.arange(4.0)
    low = predict(student, params, *inputs(), w).x
    high = predict(make(name).conditioned_on_w(), params, *inputs(), w).x
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - high).max() < 0.2 * np.abs(high).max()


@pytest.mark.parametrize(
    ("name", "blocks", "product"),
    [("unet", "down_0_0", "conv_1"), ("transformer", "block_0", "expand")],
)
def test_in_bfloat16_the_residual_stream_stays_float32(name, blocks, product):
    module = make(name, dtype="bfloat16").module

    def layers(key):
        z, t, condition = inputs()
        _, state = module.init_with_output(
            key, z, t, condition, capture_intermediates=True, mutable=True
        )
        return flatten_dict(state["intermediates"])

    found = {path[:-1]: values[0].dtype for path, values in jax.eval_shape(layers, KEY).items()}
    assert found[blocks,] == jnp.float32
    assert found[blocks, product] == jnp.bfloat16


def test_patches_are_local_and_invertible():
    image = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    patches = to_patches(image, 2)
    np.testing.assert_array_equal(from_patches(patches, 2), image)
    np.testing.assert_array_equal(patches[0, 0, 1].reshape(2, 2, 3), image[0, :2, 2:4])


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
        student_params(random_params(make("mlp")), random_params(wide))


@pytest.mark.parametrize("name", OPTIONS)
def test_dropout_masks_belong_to_their_examples(name):
    network = make(name).with_dropout(0.5)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, KEY)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    # Four equal examples, so that only their masks differ.
    z = jnp.tile(rng.standard_normal((1, *SHAPE), np.float32), (4, 1, 1, 1))
    time, condition = jnp.full(4, 3.0), {"label": jnp.ones(4, jnp.int32)}
    keys = jax.random.split(jax.random.key(0), 4)

    def dropped(part):
        rows = (z[part], time[part], {"label": condition["label"][part]}, None)
        return np.asarray(apply_with_dropout(network.module, params, keys[part], *rows))

    together = dropped(slice(None))
    scale = np.abs(together).max()
    apart = np.concatenate([dropped(slice(0, 1)), dropped(slice(1, 4))])
    np.testing.assert_allclose(apart, together, rtol=1e-4, atol=1e-4 * scale)
    for one in range(3):
        assert np.abs(together[one] - together[one + 1]).max() > 1e-2 * scale
