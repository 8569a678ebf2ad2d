"""Embeddings of time, class and guidance weight, summed to one vector that conditions a network."""

import functools
import math
from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from guided_distill import kinds

Features = Annotated[int, kinds.Range(4, 2**16)]
"""How many sines and cosines a `sinusoid` is made of; of fewer than four, there is no span to divide."""


def inverse_cosine_time(log_snr: jax.Array) -> jax.Array:
    """log_snr [B] -> arctan(sigma/alpha) / (pi/2) in [0, 1]: the time input of Salimans & Ho 2022.

    It depends on the noise level alone, never on an index that a number of steps would rescale.
    """
    return jnp.arctan(jnp.exp(-0.5 * log_snr)) / (0.5 * math.pi)


def sinusoid(value: jax.Array, width: int, *, scale: float, max_period: float = 1e4) -> jax.Array:
    """[B] -> [B, width]: sines and cosines of scale * value at `width`/2 geometric frequencies."""
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = scale * value[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


W_FEATURES: dict[str, Callable[..., jax.Array]] = {
    "fourier": sinusoid,
    "scalar": lambda w, width, *, scale: w[:, None],
}
"""How a network sees w before its layers: as it sees time (Meng et al. 2023), or as the number itself."""


class EmbeddingMLP(nn.Module):
    """Dense -> swish -> Dense."""

    width: int
    zero_output: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """[B, D] -> [B, width]."""
        hidden = nn.swish(nn.Dense(self.width, dtype=self.dtype, name="hidden")(features))
        init = nn.initializers.zeros if self.zero_output else nn.linear.default_kernel_init
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=init, name="output")(hidden)


class Conditioning(nn.Module):
    """Time, class and (where w_conditioned) guidance weight, embedded and added.

    w_embedding: a name of W_FEATURES; by "fourier", w is embedded as time is.
    The projection of w starts at zero, so that a student begins as its teacher at every w
    (Meng et al. 2023: w enters as the time step does).
    """

    width: int
    num_classes: int
    w_conditioned: bool
    sinusoid_width: int
    w_embedding: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, log_snr: jax.Array, label: jax.Array, w: jax.Array | None) -> jax.Array:
        """log_snr, label, w: [B] each -> [B, width]. Label num_classes is the null label.

        Raises ValueError if w is given to a network that doesn't take it, or missing from one that
        does.
        """
        if self.w_conditioned != (w is not None):
            raise ValueError(f"w_conditioned is {self.w_conditioned}, but w is {w}")
        mlp = functools.partial(EmbeddingMLP, self.width, dtype=self.dtype)
        time = sinusoid(inverse_cosine_time(log_snr), self.sinusoid_width, scale=1000.0)
        embedding = mlp(name="time")(time)
        embedding += nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype, name="label")(
            label
        )
        if w is not None:
            features = W_FEATURES[self.w_embedding](w, self.sinusoid_width, scale=1000.0 / 16.0)
            embedding += mlp(zero_output=True, name="w")(features)
        return embedding
