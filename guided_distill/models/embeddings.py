"""Embeddings of time, label and guidance weight, summed into the vector that conditions a network."""

import functools
import math
from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from guided_distill import kinds

TIME_SCALE = 1000.0
"""The usual `time_scale`, which resolves a thousand times in [0, 1]."""

Features = Annotated[int, kinds.Range(4, 2**16)]
"""The width of a `sinusoid`: at least four, because it needs two frequencies."""


def inverse_cosine_time(log_snr: jax.Array) -> jax.Array:
    """log_snr [B] -> arctan(sigma/alpha) / (pi/2) in [0, 1], the time input of Salimans & Ho 2022.

    It depends only on the noise level, never on an index that changes with the number of steps.
    """
    return jnp.arctan(jnp.exp(-0.5 * log_snr)) / (0.5 * math.pi)


def sinusoid(value: jax.Array, width: int, *, scale: float, max_period: float = 1e4) -> jax.Array:
    """[B] -> [B, width]: sines, then cosines, of scale * value at width/2 geometric frequencies."""
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = scale * value[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


W_FEATURES: dict[str, Callable[..., jax.Array]] = {
    "fourier": sinusoid,
    "scalar": lambda w, width, *, scale: w[:, None],
}
"""The features of w that a network embeds: a sinusoid, as for time (Meng et al. 2023), or w itself."""


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
    """The sum of the embeddings of time, label and (if w_conditioned) guidance weight.

    w_embedding: a key of W_FEATURES; "fourier" embeds w as time is embedded (Meng et al. 2023).
    time_scale: the largest frequency of the time embedding, in radians over [0, 1].
    The projection of w starts at zero, so that a student starts out equal to its teacher at every w.
    """

    width: int
    num_classes: int
    w_conditioned: bool
    sinusoid_width: int
    w_embedding: str
    time_scale: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, log_snr: jax.Array, label: jax.Array, w: jax.Array | None) -> jax.Array:
        """log_snr, label, w: [B] each -> [B, width]. Label num_classes is the null label.

        Raises ValueError if w is given but the network isn't conditioned on w, or the reverse.
        """
        if self.w_conditioned != (w is not None):
            raise ValueError(f"w_conditioned is {self.w_conditioned}, but w is {w}")
        mlp = functools.partial(EmbeddingMLP, self.width, dtype=self.dtype)
        time = sinusoid(inverse_cosine_time(log_snr), self.sinusoid_width, scale=self.time_scale)
        embedding = mlp(name="time")(time)
        embedding += nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype, name="label")(
            label
        )
        if w is not None:
            features = W_FEATURES[self.w_embedding](w, self.sinusoid_width, scale=1000.0 / 16.0)
            embedding += mlp(zero_output=True, name="w")(features)
        return embedding
