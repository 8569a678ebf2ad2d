"""A residual perceptron, for points in the plane and for images small enough to treat as vectors."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from guided_distill import kinds
from guided_distill.diffusion.guidance import Condition
from guided_distill.models.embeddings import TIME_SCALE, Conditioning, Features


class MLP(nn.Module):
    """Dense -> `depth` residual blocks, scaled and shifted by the conditioning -> Dense."""

    head: ClassVar[str] = "output"
    takes_timesteps: ClassVar[bool] = False
    conditions: ClassVar[tuple[str, ...]] = ("label",)

    width: kinds.Width
    """Width of the residual stream."""
    depth: kinds.Count
    """Number of residual blocks."""
    embedding_width: Features
    """Width of the embedding of time, label and w."""
    num_classes: int
    time_scale: kinds.Positive = TIME_SCALE
    """Largest frequency of the time embedding, in radians over [0, 1]."""
    w_conditioned: bool = False
    w_embedding: str = "fourier"
    num_outputs: int = 1
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        log_snr: jax.Array,
        condition: Condition,
        w: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """z [B, ..., C]; log_snr, the label and w [B] -> [B, ..., num_outputs C]."""
        embedding = nn.swish(
            Conditioning(
                self.embedding_width,
                self.num_classes,
                self.w_conditioned,
                sinusoid_width=self.embedding_width,
                w_embedding=self.w_embedding,
                time_scale=self.time_scale,
                dtype=self.dtype,
                name="conditioning",
            )(log_snr, condition["label"], w)
        )
        hidden = nn.Dense(self.width, dtype=self.dtype, name="input")(z.reshape(z.shape[0], -1))
        for index in range(self.depth):
            modulation = nn.Dense(2 * self.width, dtype=self.dtype, name=f"modulation_{index}")
            scale, shift = jnp.split(modulation(embedding), 2, axis=-1)
            branch = nn.LayerNorm(
                use_scale=False, use_bias=False, dtype=self.dtype, name=f"norm_{index}"
            )(hidden)
            branch = branch * (1.0 + scale) + shift
            branch = nn.swish(
                nn.Dense(self.width, dtype=self.dtype, name=f"expand_{index}")(branch)
            )
            branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
            hidden += nn.Dense(
                self.width,
                dtype=self.dtype,
                kernel_init=nn.initializers.zeros,
                name=f"contract_{index}",
            )(branch)
        modulation = nn.Dense(
            2 * self.width,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name="output_modulation",
        )
        scale, shift = jnp.split(modulation(embedding), 2, axis=-1)
        hidden = nn.LayerNorm(dtype=self.dtype, name="output_norm")(hidden) * (1.0 + scale) + shift
        output = nn.Dense(
            self.num_outputs * z[0].size,
            kernel_init=nn.initializers.zeros,
            dtype=jnp.float32,
            name="output",
        )(hidden)
        return output.reshape(*z.shape[:-1], -1)
