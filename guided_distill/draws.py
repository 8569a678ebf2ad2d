"""Random numbers: keys from seeds, and draws that are float32 whatever JAX_ENABLE_X64 says."""

import functools

import jax
import jax.numpy as jnp

from guided_distill import kinds

normal = functools.partial(jax.random.normal, dtype=jnp.float32)
uniform = functools.partial(jax.random.uniform, dtype=jnp.float32)
integers = functools.partial(jax.random.randint, dtype=jnp.int32)


def key_of(seed: int) -> jax.Array:
    """The key that all 64 bits of a seed make: below 2^32, that of `jax.random.key`.

    Raises UserError for a seed outside of [0, 2^64).
    """
    kinds.check("the seed", seed, kinds.Seed)
    words = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def bernoulli(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool [*shape], each True at probability `rate`."""
    return jax.random.bernoulli(key, jnp.float32(rate), shape)
