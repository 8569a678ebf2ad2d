"""DiT, a transformer on latent patches (Peebles & Xie 2023), with diffusers' layout of the weights."""

import functools
from collections.abc import Iterator
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from guided_distill import kinds
from guided_distill.diffusion.guidance import Condition
from guided_distill.models.embeddings import W_FEATURES, EmbeddingMLP, Features
from guided_distill.models.patches import from_patches
from guided_distill.models.remat import Remat, rematerialized
from guided_distill.models.sizes import sides, undivided
from guided_distill.models.stable_diffusion.attention import FeedForward, MultiHeadAttention
from guided_distill.models.stable_diffusion.embeddings import (
    TimestepEmbedding,
    check_w,
    time_sinusoid,
)

_TIME_WIDTH = 256


def grid_sinusoid(rows: int, columns: int, width: int) -> np.ndarray:
    """Position embeddings [rows columns, width]; the first half encodes the column, the rest the row."""
    frequencies = 1e4 ** -(np.arange(width // 4) / (width // 4))

    def embed(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    row, column = np.mgrid[:rows, :columns]
    return np.concatenate([embed(column), embed(row)], axis=-1)


class LabelEmbedding(nn.Module):
    """A table of embeddings with one more row for the null label."""

    num_classes: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        """[B] -> [B, width]."""
        rows = self.num_classes + 1
        return nn.Embed(rows, self.width, dtype=self.dtype, name="embedding_table")(label)


class TimeAndLabel(nn.Module):
    """The sum of the embeddings of time and label."""

    num_classes: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, time: jax.Array, label: jax.Array) -> jax.Array:
        """Sinusoid of time [B, D] and label [B] -> [B, width]."""
        embed_time = TimestepEmbedding(self.width, self.dtype, name="timestep_embedder")
        embed_label = LabelEmbedding(
            self.num_classes, self.width, self.dtype, name="class_embedder"
        )
        return embed_time(time) + embed_label(label)


class AdaptiveNorm(nn.Module):
    """Embeds time and label, adds w, and projects the sum to a block's modulation (adaLN-Zero).

    It is a module of its own because diffusers keeps these weights under one name.
    """

    num_classes: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, time: jax.Array, label: jax.Array, w: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """time [B, D]; label [B]; w [B, width] -> embedding [B, width], modulation [B, 1, 6 width]."""
        embedding = TimeAndLabel(self.num_classes, self.width, self.dtype, name="emb")(time, label)
        if w is not None:
            embedding += w
        modulation = nn.Dense(
            6 * self.width, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="linear"
        )(nn.swish(embedding))
        return embedding, modulation[:, None, :]


class DiTBlock(nn.Module):
    """Attention and a perceptron, both scaled, shifted and gated by the block's own embedding."""

    num_heads: int
    num_classes: int
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, tokens: jax.Array, time: jax.Array, label: jax.Array, w: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """tokens [B, T, C], time [B, D], label [B], w [B, C] -> tokens [B, T, C], embedding [B, C]."""
        width = tokens.shape[-1]
        embedding, modulation = AdaptiveNorm(self.num_classes, width, self.dtype, name="norm1")(
            time, label, w
        )
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        norm = functools.partial(nn.LayerNorm, use_scale=False, use_bias=False, dtype=self.dtype)
        attention = MultiHeadAttention(
            self.num_heads, qkv_bias=True, dtype=self.dtype, name="attn1"
        )
        feed_forward = FeedForward(4 * width, nn.gelu, self.dropout, self.dtype, name="ff")
        tokens += gate_a * attention(norm(epsilon=1e-6)(tokens) * (1.0 + scale_a) + shift_a)
        branch = norm(epsilon=1e-5)(tokens) * (1.0 + scale_m) + shift_m
        return tokens + gate_m * feed_forward(branch), embedding


class PatchEmbedding(nn.Module):
    """Projects patches to tokens and adds position embeddings."""

    width: int
    patch_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, h w, width]."""
        size = (self.patch_size, self.patch_size)
        patches = nn.Conv(
            self.width, size, strides=size, padding="VALID", dtype=self.dtype, name="proj"
        )(z)
        batch, rows, columns, _ = patches.shape
        position = jnp.asarray(grid_sinusoid(rows, columns, self.width), self.dtype)
        return patches.reshape(batch, rows * columns, -1) + position[None]


class DiT(nn.Module):
    """Patches -> num_layers transformer blocks -> patches.

    Fields have diffusers' names. diffusers has no embedding of w: here it is a perceptron of
    W_FEATURES[w_embedding] that is added to every block's embedding of time and starts at zero.
    """

    head: ClassVar[str] = "proj_out_2"
    takes_timesteps: ClassVar[bool] = True
    conditions: ClassVar[tuple[str, ...]] = ("label",)

    num_classes: int
    num_layers: kinds.Count = 28
    """Number of transformer blocks."""
    num_attention_heads: kinds.Width = 16
    """Attention heads of each block."""
    attention_head_dim: kinds.Width = 72
    """Width of one head, as in diffusers."""
    patch_size: kinds.Width = 2
    """Side of a patch in latents."""
    learned_sigma: bool = True
    """Whether the weights also predict the variance, as the published ones do; the network then keeps
    those weights but doesn't return the variance."""
    w_conditioned: bool = False
    w_embedding: str = "fourier"
    w_embedding_width: Features = 256
    """Width of the features of w."""
    num_outputs: int = 1
    dropout: float = 0.0
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""
    dtype: DTypeLike = jnp.float32

    def misfits(self, shape: tuple[int, ...]) -> Iterator[str]:
        """Yields a message, beginning with the option, for each option that doesn't fit this shape."""
        yield from undivided("patch_size", self.patch_size, sides(shape))
        if self.num_attention_heads * self.attention_head_dim % 4:
            yield (
                f"attention_head_dim is {self.attention_head_dim} and num_attention_heads is "
                f"{self.num_attention_heads}: make their product a multiple of 4"
            )

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        time: jax.Array,
        condition: Condition,
        w: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """z [B, H, W, C]; time [B], the index of the noise level; w [B] -> [B, H, W, num_outputs C].

        condition: "label" [B]; label num_classes is the null label. H and W are multiples of patch_size.
        Raises ValueError if w is given but the network isn't conditioned on w, or the reverse.
        """
        check_w(w, w_conditioned=self.w_conditioned)
        width = self.num_attention_heads * self.attention_head_dim
        if w is not None:
            features = W_FEATURES[self.w_embedding](w, self.w_embedding_width, scale=1000.0)
            w = EmbeddingMLP(width, zero_output=True, dtype=self.dtype, name="w")(features)
        embedded_time = time_sinusoid(time, _TIME_WIDTH, frequency_shift=1)
        tokens = PatchEmbedding(width, self.patch_size, self.dtype, name="pos_embed")(z)
        block = rematerialized(DiTBlock, self.remat)
        embeddings = []
        for index in range(self.num_layers):
            tokens, embedding = block(
                self.num_attention_heads,
                self.num_classes,
                self.dropout if train else 0.0,
                self.dtype,
                name=f"transformer_blocks_{index}",
            )(tokens, embedded_time, condition["label"], w)
            embeddings.append(embedding)

        # The last layer has no embedding of its own: it uses the first block's.
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
        modulation = dense(2 * width, dtype=self.dtype, name="proj_out_1")(nn.swish(embeddings[0]))
        shift, scale = jnp.split(modulation[:, None, :], 2, axis=-1)
        tokens = nn.LayerNorm(
            epsilon=1e-6, use_scale=False, use_bias=False, dtype=self.dtype, name="norm_out"
        )(tokens)
        tokens = tokens * (1.0 + scale) + shift
        channels = (self.num_outputs + self.learned_sigma) * z.shape[-1]
        patches = dense(self.patch_size**2 * channels, dtype=jnp.float32, name="proj_out_2")(tokens)
        rows, columns = (side // self.patch_size for side in z.shape[1:3])
        image = from_patches(patches.reshape(z.shape[0], rows, columns, -1), self.patch_size)
        return image[..., : self.num_outputs * z.shape[-1]]
