"""The embedding that conditions every block, of the noise level's index and of the guidance weight."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def time_sinusoid(time: jax.Array, width: int, *, frequency_shift: int = 0) -> jax.Array:
    """time [B] -> [B, width]: cosines, then sines, at width/2 frequencies.

    Frequency k is 10000^(-k / (width/2 - frequency_shift)).
    """
    half = width // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - frequency_shift)
    angles = time.astype(jnp.float32)[:, None] * jnp.exp(-math.log(1e4) * exponents)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def check_w(w: jax.Array | None, *, w_conditioned: bool) -> None:
    """Raises ValueError if w is given but the network isn't conditioned on w, or the reverse."""
    if w_conditioned != (w is not None):
        raise ValueError(f"w_conditioned is {w_conditioned}, but w is {w}")


class TimestepEmbedding(nn.Module):
    """Dense -> swish -> Dense; the projection of w, added to the sinusoid of time, starts at zero."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, time: jax.Array, w: jax.Array | None = None) -> jax.Array:
        """Sinusoid of time [B, D] and features of w [B, E], from W_FEATURES -> [B, width]."""
        if w is not None:
            time += nn.Dense(
                time.shape[-1],
                use_bias=False,
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                name="cond_proj",
            )(w)
        hidden = nn.swish(nn.Dense(self.width, dtype=self.dtype, name="linear_1")(time))
        return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(hidden)
