"""The blocks of the U-Net and of the autoencoders' encoders and decoders."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class ResnetBlock(nn.Module):
    """A residual block of two 3x3 convolutions; the embedding, if given, is added between them."""

    channels: int
    norm_num_groups: int
    norm_eps: float
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, embedding: jax.Array | None = None) -> jax.Array:
        """image [B, H, W, C], embedding [B, D] -> [B, H, W, channels]."""
        norm = functools.partial(
            nn.GroupNorm, self.norm_num_groups, epsilon=self.norm_eps, dtype=self.dtype
        )
        conv = functools.partial(nn.Conv, self.channels, dtype=self.dtype)
        branch = conv((3, 3), name="conv1")(nn.swish(norm(name="norm1")(image)))
        if embedding is not None:
            added = nn.Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(embedding)
            branch += added[:, None, None, :]
        branch = nn.swish(norm(name="norm2")(branch))
        branch = nn.Dropout(self.dropout, deterministic=False)(branch)
        branch = conv((3, 3), kernel_init=nn.initializers.zeros, name="conv2")(branch)
        if image.shape[-1] != self.channels:
            image = conv((1, 1), name="conv_shortcut")(image)
        return image + branch


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2. padding: rows and columns added before and after."""

    padding: tuple[int, int]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', C]."""
        return nn.Conv(
            image.shape[-1],
            (3, 3),
            strides=2,
            padding=(self.padding, self.padding),
            dtype=self.dtype,
            name="conv",
        )(image)


class Upsample(nn.Module):
    """Doubles the image by repetition, then convolves it 3x3. size: rows and columns, 2n or 2n - 1."""

    size: tuple[int, int]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, *size, C]."""
        rows, columns = self.size
        doubled = image.repeat(2, axis=1).repeat(2, axis=2)[:, :rows, :columns]
        return nn.Conv(image.shape[-1], (3, 3), dtype=self.dtype, name="conv")(doubled)


Layer = Callable[..., nn.Module]
"""A module's class, or a functools.partial of it."""


class Level(nn.Module):
    """All layers at one resolution, and the resampling to the next.

    resnet(channels, name=...) builds the residual blocks, attention(name=...) the attention after each of
    them, and downsampler(name=...) or upsampler(name=...) the resampling; None leaves the layer out.
    """

    channels: int
    num_layers: int
    resnet: Layer
    attention: Layer | None = None
    downsampler: Layer | None = None
    upsampler: Layer | None = None

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        embedding: jax.Array | None = None,
        context: jax.Array | None = None,
        skips: Sequence[jax.Array] = (),
    ) -> tuple[jax.Array, list[jax.Array]]:
        """image [B, H, W, C] -> the level's output, and the images after each of its steps, in order.

        skips: the images to concatenate before each layer, used from last to first.
        """
        steps = []
        for index in range(self.num_layers):
            if skips:
                image = jnp.concatenate([image, skips[-1 - index]], axis=-1)
            image = self.resnet(self.channels, name=f"resnets_{index}")(image, embedding)
            if self.attention is not None:
                image = self.attention(name=f"attentions_{index}")(image, context)
            steps.append(image)
        if self.downsampler is not None:
            image = self.downsampler(name="downsamplers_0")(image)
            steps.append(image)
        if self.upsampler is not None:
            image = self.upsampler(name="upsamplers_0")(image)
        return image, steps


class Middle(nn.Module):
    """Attention between two residual blocks."""

    channels: int
    resnet: Layer
    attention: Layer

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        embedding: jax.Array | None = None,
        context: jax.Array | None = None,
    ) -> jax.Array:
        """[B, H, W, channels] -> the same."""
        image = self.resnet(self.channels, name="resnets_0")(image, embedding)
        image = self.attention(name="attentions_0")(image, context)
        return self.resnet(self.channels, name="resnets_1")(image, embedding)
