"""Random numbers: keys from seeds, and draws that are float32 whatever JAX_ENABLE_X64 says."""

import functools

import jax
import jax.numpy as jnp

from guided_distill.errors import UserError

SEEDS = 2**64
"""Seeds are whole numbers from 0 to this, which is none itself."""

normal = functools.partial(jax.random.normal, dtype=jnp.float32)
uniform = functools.partial(jax.random.uniform, dtype=jnp.float32)
integers = functools.partial(jax.random.randint, dtype=jnp.int32)


def check_seed(where: str, seed: int) -> None:
    """Raises UserError, naming the key or flag `where`, unless `seed` is in [0, 2^64)."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"{where} is {seed}; choose a whole number from 0 to 2^64 - 1")


def key_of(seed: int) -> jax.Array:
    """The key that all 64 bits of a seed make: below 2^32, that of `jax.random.key`.

    Raises UserError for a seed outside of [0, 2^64).
    """
    check_seed("the seed", seed)
    words = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def bernoulli(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool [*shape], each True at probability `rate`."""
    return jax.random.bernoulli(key, jnp.float32(rate), shape)
