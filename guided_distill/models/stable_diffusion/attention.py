"""Self-attention between pixels, cross-attention to a context, and the transformer blocks around them."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Activation = Callable[[jax.Array], jax.Array]


def gated_gelu(hidden: jax.Array) -> jax.Array:
    """[..., 2 D] -> [..., D]: the first half times the exact GELU of the second."""
    value, gate = jnp.split(hidden, 2, axis=-1)
    return value * nn.gelu(gate, approximate=False)


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    num_heads: int,
    is_causal: bool = False,
) -> jax.Array:
    """Multi-head attention of queries [B, T, C] to keys and values [B, S, C] -> [B, T, C]."""
    heads = (array.reshape(*array.shape[:2], num_heads, -1) for array in (queries, keys, values))
    return jax.nn.dot_product_attention(*heads, is_causal=is_causal).reshape(queries.shape)


class MultiHeadAttention(nn.Module):
    """Attention of tokens to a context or, without one, to themselves."""

    num_heads: int
    qkv_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """tokens [B, T, C], context [B, S, D] -> [B, T, C]; C is a multiple of num_heads."""
        if context is None:
            context = tokens
        width = tokens.shape[-1]
        project = functools.partial(nn.Dense, width, use_bias=self.qkv_bias, dtype=self.dtype)
        attended = attend(
            project(name="to_q")(tokens),
            project(name="to_k")(context),
            project(name="to_v")(context),
            num_heads=self.num_heads,
        )
        return nn.Dense(width, dtype=self.dtype, name="to_out_0")(attended)


class PixelAttention(nn.Module):
    """Residual self-attention over the pixels, with one head."""

    norm_num_groups: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Create normalization and attention, whose weights share one scope."""
        self.group_norm = nn.GroupNorm(self.norm_num_groups, epsilon=1e-6, dtype=self.dtype)
        self.attention = MultiHeadAttention(num_heads=1, qkv_bias=True, dtype=self.dtype)
        nn.share_scope(self, self.attention)

    def __call__(self, image: jax.Array, context: None = None) -> jax.Array:
        """[B, H, W, C] -> the same."""
        batch, *_, channels = image.shape
        tokens = self.group_norm(image).reshape(batch, -1, channels)
        return image + self.attention(tokens).reshape(image.shape)


class Projection(nn.Module):
    """Dense -> activation."""

    width: int
    activation: Activation
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[..., C] -> the activation of [..., width]."""
        return self.activation(nn.Dense(self.width, dtype=self.dtype, name="proj")(tokens))


class FeedForward(nn.Module):
    """Dense -> activation -> Dense. width: the output of the first Dense, before the activation."""

    width: int
    activation: Activation
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[..., C] -> the same."""
        hidden = Projection(self.width, self.activation, self.dtype, name="net_0")(tokens)
        hidden = nn.Dropout(self.dropout, deterministic=False)(hidden)
        return nn.Dense(tokens.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, and a gated perceptron."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, context: jax.Array) -> jax.Array:
        """tokens [B, T, C], context [B, S, D] -> [B, T, C]."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
        attention = functools.partial(MultiHeadAttention, self.num_heads, dtype=self.dtype)
        tokens += attention(name="attn1")(norm(name="norm1")(tokens))
        tokens += attention(name="attn2")(norm(name="norm2")(tokens), context)
        feed_forward = FeedForward(
            8 * tokens.shape[-1], activation=gated_gelu, dtype=self.dtype, name="ff"
        )
        return tokens + feed_forward(norm(name="norm3")(tokens))


class SpatialTransformer(nn.Module):
    """A residual transformer block between pixels and context.

    use_linear_projection: whether the projections before and after the block are stored as matrices
    rather than as 1x1 convolutions.
    """

    num_heads: int
    norm_num_groups: int
    use_linear_projection: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, context: jax.Array) -> jax.Array:
        """image [B, H, W, C], context [B, S, D] -> [B, H, W, C]."""
        batch, *_, channels = image.shape
        project: Callable[..., nn.Module]
        if self.use_linear_projection:
            project = functools.partial(nn.Dense, channels, dtype=self.dtype)
        else:
            project = functools.partial(nn.Conv, channels, (1, 1), dtype=self.dtype)
        branch = nn.GroupNorm(self.norm_num_groups, epsilon=1e-6, dtype=self.dtype, name="norm")(
            image
        )
        tokens = project(name="proj_in")(branch).reshape(batch, -1, channels)
        block = BasicTransformerBlock(self.num_heads, self.dtype, name="transformer_blocks_0")
        branch = block(tokens, context).reshape(image.shape)
        return image + project(kernel_init=nn.initializers.zeros, name="proj_out")(branch)
