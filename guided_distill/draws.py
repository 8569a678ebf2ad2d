"""Random numbers: keys from seeds, and draws in float32 regardless of JAX_ENABLE_X64.

The functions that take keys [B] draw for each example from its own key, so the draws don't depend on how
a batch is split over devices, over the parts of an accumulation or over calls.
"""

import functools

import jax
import jax.numpy as jnp

from guided_distill import kinds

normal = functools.partial(jax.random.normal, dtype=jnp.float32)


def key_of(seed: int) -> jax.Array:
    """Return the key of a 64-bit seed; for seeds below 2^32 it is that of `jax.random.key`.

    Raises UserError for a seed outside [0, 2^64).
    """
    kinds.check("the seed", seed, kinds.Seed)
    words = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def split(keys: jax.Array, count: int) -> jax.Array:
    """Split each key [B] into `count` keys: [count, B]."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def fold_in(keys: jax.Array, data: jax.Array | int) -> jax.Array:
    """Fold the same number into each key [B]; returns keys [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normals(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return unit Gaussian noise [B, *shape] from keys [B]."""
    return jax.vmap(lambda key: normal(key, shape))(keys)


def uniforms(keys: jax.Array, low: float = 0.0, high: float = 1.0) -> jax.Array:
    """Return numbers [B] ~ U[low, high) from keys [B]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, low, high))(keys)


def integers(keys: jax.Array, low: int | jax.Array, high: int | jax.Array) -> jax.Array:
    """Return int32 [B], uniform in [low, high), from keys [B]."""
    return jax.vmap(lambda key: jax.random.randint(key, (), low, high, jnp.int32))(keys)


def bernoullis(keys: jax.Array, rate: float) -> jax.Array:
    """Return bool [B] from keys [B], each True with probability `rate`."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, jnp.float32(rate)))(keys)
