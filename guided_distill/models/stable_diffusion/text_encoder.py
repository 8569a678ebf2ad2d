"""CLIP's text encoder (Radford et al. 2021), without its pooled output."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from guided_distill.models.stable_diffusion.attention import attend

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda hidden: hidden * nn.sigmoid(1.702 * hidden),
    "gelu": functools.partial(nn.gelu, approximate=False),
}


class TextEmbeddings(nn.Module):
    """The sum of the embeddings of a token and of its position."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, L] -> [B, L, hidden_size]."""
        embed = functools.partial(nn.Embed, features=self.hidden_size, dtype=self.dtype)
        positions = jnp.arange(tokens.shape[1])[None]
        return embed(self.vocab_size, name="token_embedding")(tokens) + embed(
            self.max_position_embeddings, name="position_embedding"
        )(positions)


class CausalAttention(nn.Module):
    """Attention of every token to itself and the tokens before it."""

    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, L, D] -> the same."""
        project = functools.partial(nn.Dense, hidden.shape[-1], dtype=self.dtype)
        attended = attend(
            project(name="q_proj")(hidden),
            project(name="k_proj")(hidden),
            project(name="v_proj")(hidden),
            num_heads=self.num_heads,
            is_causal=True,
        )
        return project(name="out_proj")(attended)


class Perceptron(nn.Module):
    """Dense -> activation -> Dense."""

    width: int
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, L, D] -> the same."""
        branch = ACTIVATIONS[self.activation](
            nn.Dense(self.width, dtype=self.dtype, name="fc1")(hidden)
        )
        return nn.Dense(hidden.shape[-1], dtype=self.dtype, name="fc2")(branch)


class TextLayer(nn.Module):
    """Attention and a perceptron, both residual and pre-normalized."""

    num_heads: int
    intermediate_size: int
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, L, D] -> the same."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
        attention = CausalAttention(self.num_heads, self.dtype, name="self_attn")
        perceptron = Perceptron(self.intermediate_size, self.activation, self.dtype, name="mlp")
        hidden += attention(norm(name="layer_norm1")(hidden))
        return hidden + perceptron(norm(name="layer_norm2")(hidden))


class TextLayers(nn.Module):
    """A stack of text layers."""

    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, L, D] -> the same."""
        for index in range(self.num_layers):
            hidden = TextLayer(
                self.num_heads,
                self.intermediate_size,
                self.activation,
                self.dtype,
                name=f"layers_{index}",
            )(hidden)
        return hidden


class CLIPTextEncoder(nn.Module):
    """Encodes tokens to the context of the U-Net: all states of the last layer, normalized.

    Fields are those of transformers' CLIPTextConfig; hidden_act is one of ACTIVATIONS.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, L] -> [B, L, hidden_size]; L, with padding, is at most max_position_embeddings."""
        hidden = TextEmbeddings(
            self.vocab_size,
            self.hidden_size,
            self.max_position_embeddings,
            self.dtype,
            name="embeddings",
        )(tokens)
        hidden = TextLayers(
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            self.hidden_act,
            self.dtype,
            name="encoder",
        )(hidden)
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="final_layer_norm")(hidden)
