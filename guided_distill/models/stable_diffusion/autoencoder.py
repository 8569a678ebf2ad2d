"""From images to latents and back: the autoencoders of latent diffusion (Rombach et al. 2022)."""

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
        """Residual blocks without an embedding."""
        return functools.partial(
            ResnetBlock, norm_num_groups=self.norm_num_groups, norm_eps=1e-6, dtype=self.dtype
        )

    def attention(self, level: int) -> Layer | None:
        """What follows each residual block of a level."""
        return self._attention() if level in self.attention_levels else None

    def middle(self, image: jax.Array) -> jax.Array:
        """The middle, at the lowest resolution."""
        channels = self.block_out_channels[-1]
        return Middle(channels, self.resnet(), self._attention(), name="mid_block")(image)

    def convolved_in(self, image: jax.Array, channels: int) -> jax.Array:
        """The first convolution."""
        return nn.Conv(channels, (3, 3), dtype=self.dtype, name="conv_in")(image)

    def convolved_out(self, image: jax.Array) -> jax.Array:
        """The last one."""
        image = nn.GroupNorm(
            self.norm_num_groups, epsilon=1e-6, dtype=self.dtype, name="conv_norm_out"
        )(image)
        return nn.Conv(self.out_channels, (3, 3), dtype=self.dtype, name="conv_out")(
            nn.swish(image)
        )

    def _attention(self) -> Layer:
        return functools.partial(PixelAttention, self.norm_num_groups, self.dtype)


class Encoder(CoderBase):
    """Each level halves the resolution, but the last."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, out_channels]."""
        image = self.convolved_in(image, self.block_out_channels[0])
        # One more row and column on the far side alone, as these weights were trained.
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
    """The encoder's levels in reverse, each with one residual block more."""

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
    """Images in [-1, 1] to latents at 1/2^(levels-1) of the resolution, and back.

    The diffusion's latents are the autoencoder's times scaling_factor; to_latents and to_images alone
    apply it.
    """

    block_out_channels: tuple[kinds.Width, ...] = (128, 256, 512, 512)
    latent_channels: kinds.Width = 4
    layers_per_block: kinds.Count = 2
    attention_levels: tuple[kinds.Whole, ...] = ()
    norm_num_groups: kinds.Width = 32
    scaling_factor: float = 0.18215
    image_channels: int = 3
    dtype: DTypeLike = jnp.float32

    def misfits(self, shape: tuple[int, ...]) -> Iterator[str]:
        """Yields what is amiss with an option, by its name, for images of any shape."""
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
        """Latents [B, h, w, latent_channels], not scaled -> images [B, H, W, C]."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def to_images(self, latents: jax.Array) -> jax.Array:
        """The diffusion's latents [B, h, w, latent_channels] -> images [B, H, W, C]."""
        return self.decode(latents / self.scaling_factor)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images to the diffusion's latents, and back."""
        return self.to_images(self.to_latents(images))


class AutoencoderKL(AutoencoderBase):
    """Latents are normal numbers around what the encoder says."""

    def setup(self) -> None:
        """All layers."""
        self._layers(encoded_channels=2 * self.latent_channels)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, C] -> mean and log variance [B, h, w, latent_channels], not scaled.

        The log variance is clipped to [-30, 20].
        """
        mean, log_variance = jnp.split(self._encoded(images), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def to_latents(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Images -> the diffusion's latents, drawn with the key; without one, their mean."""
        latents, log_variance = self.encode(images)
        if key is not None:
            noise = jax.random.normal(key, latents.shape, latents.dtype)
            latents += jnp.exp(0.5 * log_variance) * noise
        return latents * self.scaling_factor


class VectorQuantizer(nn.Module):
    """The nearest entries of a codebook."""

    size: int
    width: int

    def setup(self) -> None:
        """The codebook."""
        self.embedding = nn.Embed(self.size, self.width)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """[B, h, w, width] -> the same."""
        codes = self.embedding.embedding
        # Squares of distances, less what all entries share. Coarse products would move the choice.
        products = jnp.einsum("bhwc,kc->bhwk", latents, codes, precision="highest")
        distances = jnp.square(codes).sum(axis=-1)[None, None, None, :] - 2.0 * products
        return self.embedding(distances.argmin(axis=-1))


class VQModel(AutoencoderBase):
    """Latents become the nearest of num_vq_embeddings codes as they are decoded, and not before."""

    block_out_channels: tuple[int, ...] = (128, 256, 512)
    latent_channels: int = 3
    scaling_factor: float = 1.0
    num_vq_embeddings: int = 8192

    def setup(self) -> None:
        """All layers."""
        self._layers(encoded_channels=self.latent_channels)
        self.quantize = VectorQuantizer(self.num_vq_embeddings, self.latent_channels)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, C] -> latents [B, h, w, latent_channels], not scaled."""
        return self._encoded(images)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, latent_channels], not scaled -> images [B, H, W, C]."""
        return super().decode(self.quantize(latents))

    def to_latents(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Images -> the diffusion's latents; nothing is drawn."""
        return self.encode(images) * self.scaling_factor
