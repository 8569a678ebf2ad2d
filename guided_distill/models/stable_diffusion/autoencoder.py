"""The autoencoders of latent diffusion, from images to latents and back (Rombach et al. 2022)."""

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from guided_distill import kinds
from guided_distill.models.sizes import misfit_groups, misfit_levels
from guided_distill.models.stable_diffusion.attention import PixelAttention
from guided_distill.models.stable_diffusion.blocks import (
    Downsample,
    Layer,
    Level,
    Middle,
    ResnetBlock,
    Upsample,
)


class CoderBase(nn.Module):
    """What the encoder and the decoder have in common.

    attention_levels: indices into block_out_channels, from full resolution down.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_levels: tuple[int, ...]
    norm_num_groups: int
    dtype: DTypeLike
    out_channels: int

    def resnet(self) -> Layer:
        """The constructor of residual blocks without an embedding."""
        return functools.partial(
            ResnetBlock, norm_num_groups=self.norm_num_groups, norm_eps=1e-6, dtype=self.dtype
        )

    def attention(self, level: int) -> Layer | None:
        """The constructor of the attention after each residual block of a level; None if it has none."""
        return self._attention() if level in self.attention_levels else None

    def middle(self, image: jax.Array) -> jax.Array:
        """Apply the middle block, at the lowest resolution."""
        channels = self.block_out_channels[-1]
        return Middle(channels, self.resnet(), self._attention(), name="mid_block")(image)

    def convolved_in(self, image: jax.Array, channels: int) -> jax.Array:
        """Apply the first convolution."""
        return nn.Conv(channels, (3, 3), dtype=self.dtype, name="conv_in")(image)

    def convolved_out(self, image: jax.Array) -> jax.Array:
        """Apply the last normalization and convolution."""
        image = nn.GroupNorm(
            self.norm_num_groups, epsilon=1e-6, dtype=self.dtype, name="conv_norm_out"
        )(image)
        return nn.Conv(self.out_channels, (3, 3), dtype=self.dtype, name="conv_out")(
            nn.swish(image)
        )

    def _attention(self) -> Layer:
        return functools.partial(PixelAttention, self.norm_num_groups, self.dtype)


class Encoder(CoderBase):
    """The encoder; each level except the last halves the resolution."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, out_channels]."""
        image = self.convolved_in(image, self.block_out_channels[0])
        # The published weights were trained with padding at the bottom and right only.
        downsampler = functools.partial(Downsample, (0, 1), self.dtype)
        last_level = len(self.block_out_channels) - 1
        for level, channels in enumerate(self.block_out_channels):
            image, _ = Level(
                channels,
                self.layers_per_block,
                self.resnet(),
                self.attention(level),
                downsampler=downsampler if level < last_level else None,
                name=f"down_blocks_{level}",
            )(image)
        return self.convolved_out(self.middle(image))


class Decoder(CoderBase):
    """The decoder: the encoder's levels in reverse, each with one more residual block."""

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, H, W, out_channels]."""
        image = self.middle(self.convolved_in(latents, self.block_out_channels[-1]))
        for index, level in enumerate(reversed(range(len(self.block_out_channels)))):
            upsampler = None
            if level > 0:
                size = (2 * image.shape[1], 2 * image.shape[2])
                upsampler = functools.partial(Upsample, size, self.dtype)
            image, _ = Level(
                self.block_out_channels[level],
                self.layers_per_block + 1,
                self.resnet(),
                self.attention(level),
                upsampler=upsampler,
                name=f"up_blocks_{index}",
            )(image)
        return self.convolved_out(image)


class AutoencoderBase(nn.Module):
    """Encodes images in [-1, 1] to latents at 1/2^(levels-1) of the resolution, and decodes them.

    Diffusion uses the autoencoder's latents times scaling_factor; only to_latents and to_images apply it.
    """

    block_out_channels: tuple[kinds.Width, ...] = (128, 256, 512, 512)
    """Channels of each level, from full resolution down; each level after the first halves the sides."""
    latent_channels: kinds.Width = 4
    """Channels of a latent."""
    layers_per_block: kinds.Count = 2
    """Residual blocks of each level in the encoder; the decoder has one more."""
    attention_levels: tuple[kinds.Whole, ...] = ()
    """Levels that attend, as indices into block_out_channels; the middle always attends."""
    norm_num_groups: kinds.Width = 32
    """Groups of every group normalization."""
    scaling_factor: float = 0.18215
    image_channels: int = 3
    dtype: DTypeLike = jnp.float32

    def misfits(self, shape: tuple[int, ...]) -> Iterator[str]:
        """Yields a message, beginning with the option, for each option that is wrong for any shape."""
        if not self.block_out_channels:
            yield "block_out_channels is empty: give one for each level"
        yield from misfit_levels("attention_levels", self.attention_levels, self.block_out_channels)
        yield from misfit_groups(self.norm_num_groups, self.block_out_channels)

    def _layers(self, *, encoded_channels: int) -> None:
        shared = (
            self.block_out_channels,
            self.layers_per_block,
            self.attention_levels,
            self.norm_num_groups,
            self.dtype,
        )
        self.encoder = Encoder(*shared, out_channels=encoded_channels)
        self.quant_conv = nn.Conv(encoded_channels, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)
        self.decoder = Decoder(*shared, out_channels=self.image_channels)

    def _encoded(self, images: jax.Array) -> jax.Array:
        return self.quant_conv(self.encoder(images)).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Unscaled latents [B, h, w, latent_channels] -> images [B, H, W, C]."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def to_images(self, latents: jax.Array) -> jax.Array:
        """Scaled latents [B, h, w, latent_channels] -> images [B, H, W, C]."""
        return self.decode(latents / self.scaling_factor)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Encode images to scaled latents and decode these."""
        return self.to_images(self.to_latents(images))


class AutoencoderKL(AutoencoderBase):
    """An autoencoder whose latents are normally distributed, with the encoder's mean and variance."""

    def setup(self) -> None:
        """Create all layers."""
        self._layers(encoded_channels=2 * self.latent_channels)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, C] -> unscaled mean and log variance [B, h, w, latent_channels].

        The log variance is clipped to [-30, 20].
        """
        mean, log_variance = jnp.split(self._encoded(images), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def to_latents(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Images -> scaled latents, drawn with the key; without a key, their mean."""
        latents, log_variance = self.encode(images)
        if key is not None:
            noise = jax.random.normal(key, latents.shape, latents.dtype)
            latents += jnp.exp(0.5 * log_variance) * noise
        return latents * self.scaling_factor


class VectorQuantizer(nn.Module):
    """Replaces each latent by the nearest entry of a codebook."""

    size: int
    width: int

    def setup(self) -> None:
        """Create the codebook."""
        self.embedding = nn.Embed(self.size, self.width)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """[B, h, w, width] -> the same."""
        codes = self.embedding.embedding
        # Squared distances, less the term that all entries share. Low precision could change the argmin.
        products = jnp.einsum("bhwc,kc->bhwk", latents, codes, precision="highest")
        distances = jnp.square(codes).sum(axis=-1)[None, None, None, :] - 2.0 * products
        return self.embedding(distances.argmin(axis=-1))


class VQModel(AutoencoderBase):
    """An autoencoder that quantizes latents to the nearest of num_vq_embeddings codes when it decodes."""

    block_out_channels: tuple[int, ...] = (128, 256, 512)
    latent_channels: int = 3
    scaling_factor: float = 1.0
    num_vq_embeddings: int = 8192

    def setup(self) -> None:
        """Create all layers."""
        self._layers(encoded_channels=self.latent_channels)
        self.quantize = VectorQuantizer(self.num_vq_embeddings, self.latent_channels)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, C] -> unscaled latents [B, h, w, latent_channels]."""
        return self._encoded(images)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Unscaled latents [B, h, w, latent_channels] -> images [B, H, W, C]."""
        return super().decode(self.quantize(latents))

    def to_latents(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Images -> scaled latents, which are deterministic: the key is unused."""
        return self.encode(images) * self.scaling_factor
