"""A patch transformer with adaptive layer norm, similar to DiT (Peebles & Xie 2023)."""

import functools
from collections.abc import Iterator
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from guided_distill import kinds
from guided_distill.diffusion.guidance import Condition
from guided_distill.models.embeddings import TIME_SCALE, Conditioning, Features
from guided_distill.models.patches import from_patches, to_patches
from guided_distill.models.sizes import sides, undivided


class TransformerBlock(nn.Module):
    """Attention and a perceptron, both scaled, shifted and gated by the conditioning vector."""

    width: int
    num_heads: int
    mlp_ratio: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: jax.Array, condition: jax.Array, *, train: bool) -> jax.Array:
        """tokens [B, T, width], condition [B, D] -> [B, T, width]."""
        modulation = nn.Dense(
            6 * self.width, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="modulation"
        )(condition)[:, None, :]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, use_scale=False, use_bias=False, dtype=jnp.float32)

        branch = norm(name="attention_norm")(tokens)
        branch = branch * (1.0 + scale_a) + shift_a
        heads = (self.num_heads, self.width // self.num_heads)
        qkv = nn.DenseGeneral((3, *heads), dtype=self.dtype, name="qkv")(branch)
        attended = jax.nn.dot_product_attention(*(qkv[:, :, k] for k in range(3)))
        branch = nn.DenseGeneral(
            self.width, axis=(-2, -1), dtype=self.dtype, name="attention_output"
        )(attended)
        tokens += gate_a * branch

        branch = norm(name="mlp_norm")(tokens)
        branch = branch * (1.0 + scale_m) + shift_m
        branch = nn.gelu(dense(self.mlp_ratio * self.width, name="expand")(branch))
        branch = nn.Dropout(self.dropout, deterministic=not train)(branch)
        return tokens + gate_m * dense(self.width, name="contract")(branch)


class PatchTransformer(nn.Module):
    """Patches -> `depth` transformer blocks -> patches.

    dtype: the precision of matrix products; the residual stream and its normalizations are float32.
    """

    head: ClassVar[str] = "output"
    takes_timesteps: ClassVar[bool] = False
    conditions: ClassVar[tuple[str, ...]] = ("label",)

    width: kinds.Width
    """Width of a patch's token."""
    depth: kinds.Count
    """Number of transformer blocks."""
    num_heads: kinds.Width
    """Attention heads of each block; they divide the width."""
    patch_size: kinds.Width
    """Side of a patch in pixels."""
    embedding_width: Features
    """Width of the embedding of time, label and w."""
    num_classes: int
    mlp_ratio: kinds.Width = 4
    """Hidden width of a block's perceptron, in multiples of the width."""
    time_scale: kinds.Positive = TIME_SCALE
    """Largest frequency of the time embedding, in radians over [0, 1]."""
    w_conditioned: bool = False
    w_embedding: str = "fourier"
    num_outputs: int = 1
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def misfits(self, shape: tuple[int, ...]) -> Iterator[str]:
        """Yields a message, beginning with the option, for each option that doesn't fit this shape."""
        yield from undivided("num_heads", self.num_heads, {"width": self.width})
        yield from undivided("patch_size", self.patch_size, sides(shape))

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
        """z [B, H, W, C]; log_snr, the label and w [B] -> [B, H, W, num_outputs C].

        H and W are multiples of patch_size.
        """
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
        patches = to_patches(z, self.patch_size)
        grid = patches.shape[1:3]
        tokens = nn.Dense(self.width, dtype=jnp.float32, name="input")(patches)
        tokens = tokens.reshape(z.shape[0], -1, self.width)
        position = self.param(
            "position", nn.initializers.normal(0.02), (1, tokens.shape[1], self.width)
        )
        tokens += position
        for index in range(self.depth):
            tokens = TransformerBlock(
                self.width,
                self.num_heads,
                self.mlp_ratio,
                self.dropout,
                self.dtype,
                name=f"block_{index}",
            )(tokens, embedding, train=train)
        tokens = nn.LayerNorm(dtype=jnp.float32, name="output_norm")(tokens)
        output = nn.Dense(
            self.num_outputs * patches.shape[-1],
            kernel_init=nn.initializers.zeros,
            dtype=jnp.float32,
            name="output",
        )(tokens)
        return from_patches(output.reshape(z.shape[0], *grid, -1), self.patch_size)
