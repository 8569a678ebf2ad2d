"""Random numbers: keys from seeds, and draws that are float32 whatever JAX_ENABLE_X64 says.

What belongs to an example is drawn from a key of its own, by the functions that take keys [B]: the draws
are then the same however a batch is split over devices, over parts or over calls.
"""

import functools

import jax
import jax.numpy as jnp

from guided_distill import kinds

normal = functools.partial(jax.random.normal, dtype=jnp.float32)


def key_of(seed: int) -> jax.Array:
    """The key that all 64 bits of a seed make: below 2^32, that of `jax.random.key`.

    Raises UserError for a seed outside of [0, 2^64).
    """
    kinds.check("the seed", seed, kinds.Seed)
    words = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def split(keys: jax.Array, count: int) -> jax.Array:
    """`count` keys [count, B] of each key [B]."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def fold_in(keys: jax.Array, data: jax.Array | int) -> jax.Array:
    """Keys [B] of each key [B] and the same number."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def normals(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit noise [B, *shape] of keys [B]."""
    return jax.vmap(lambda key: normal(key, shape))(keys)


def uniforms(keys: jax.Array, low: float = 0.0, high: float = 1.0) -> jax.Array:
    """Numbers [B] ~ U[low, high) of keys [B]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, low, high))(keys)


def integers(keys: jax.Array, low: int | jax.Array, high: int | jax.Array) -> jax.Array:
    """int32 [B] in [low, high) of keys [B]."""
    return jax.vmap(lambda key: jax.random.randint(key, (), low, high, jnp.int32))(keys)


def bernoullis(keys: jax.Array, rate: float) -> jax.Array:
    """bool [B] of keys [B], each True at probability `rate`."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, jnp.float32(rate)))(keys)
