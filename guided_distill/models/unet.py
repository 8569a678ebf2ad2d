"""The pixel-space U-Net that the paper builds on (Dhariwal & Nichol 2021; Salimans & Ho 2022)."""

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
from guided_distill.models.remat import Remat, rematerialized
from guided_distill.models.sizes import sides, undivided


def group_norm(channels: int, name: str) -> nn.GroupNorm:
    """Group normalization in float32, with 32 groups or fewer.

    The number of groups divides the channels and leaves at least 4 in each group.
    """
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4)
    return nn.GroupNorm(groups, dtype=jnp.float32, name=name)


def resample(image: jax.Array, mode: str | None) -> jax.Array:
    """Halve the image by average pooling ("down"), double it by repetition ("up"), or keep it (None)."""
    if mode == "down":
        return nn.avg_pool(image, (2, 2), strides=(2, 2))
    if mode == "up":
        return image.repeat(2, axis=1).repeat(2, axis=2)
    return image


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the conditioning scales and shifts the second normalization."""

    channels: int
    dropout: float
    dtype: DTypeLike
    resampling: str | None = None

    @nn.compact
    def __call__(self, image: jax.Array, condition: jax.Array, train: bool) -> jax.Array:
        """image [B, H, W, C], condition [B, D] -> [B, H', W', channels]."""
        branch = nn.swish(group_norm(image.shape[-1], "norm_1")(image))
        branch = resample(branch, self.resampling)
        branch = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_1")(branch)
        modulation = nn.Dense(2 * self.channels, dtype=self.dtype, name="modulation")(condition)
        scale, shift = jnp.split(modulation[:, None, None, :], 2, axis=-1)
        branch = group_norm(self.channels, "norm_2")(branch) * (1.0 + scale) + shift
        branch = nn.Dropout(self.dropout, deterministic=not train)(nn.swish(branch))
        branch = nn.Conv(
            self.channels,
            (3, 3),
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="conv_2",
        )(branch)
        skip = resample(image, self.resampling)
        if skip.shape[-1] != self.channels:
            skip = nn.Dense(self.channels, dtype=jnp.float32, name="skip")(skip)
        return skip + branch


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels."""

    head_width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same; C is a multiple of head_width."""
        batch, channels = image.shape[0], image.shape[-1]
        normed = group_norm(channels, "norm")(image).reshape(batch, -1, channels)
        heads = (channels // self.head_width, self.head_width)
        qkv = nn.DenseGeneral((3, *heads), dtype=self.dtype, name="qkv")(normed)
        attended = jax.nn.dot_product_attention(*(qkv[:, :, k] for k in range(3)))
        branch = nn.DenseGeneral(
            channels,
            axis=(-2, -1),
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="output",
        )(attended)
        return image + branch.reshape(image.shape)


class UNet(nn.Module):
    """Down, middle and up, with a skip connection from every block on the way down to its match going up.

    dtype: the precision of matrix products; the residual stream and its normalizations are float32,
    because rounding them would hide what the first halving rounds have to learn (benchmarks/rounding.py).
    """

    head: ClassVar[str] = "output"
    takes_timesteps: ClassVar[bool] = False
    conditions: ClassVar[tuple[str, ...]] = ("label",)

    width: Features
    """Channels at full resolution."""
    channel_multipliers: tuple[kinds.Width, ...]
    """Level k has width * channel_multipliers[k] channels at 1/2^k of the full resolution."""
    blocks_per_level: kinds.Count
    """Residual blocks of each level on the way down; there is one more on the way up."""
    attention_resolutions: tuple[kinds.Width, ...]
    """Heights at which attention follows each residual block; the middle always attends."""
    head_width: kinds.Width
    """Channels of an attention head."""
    embedding_width: kinds.Width
    """Width of the embedding of time, label and w."""
    num_classes: int
    patch_size: kinds.Width = 1
    """Side of the squares of pixels that become channels of the first level, whose "full resolution" is
    then 1/patch_size of the image's."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""
    time_scale: kinds.Positive = TIME_SCALE
    """Largest frequency of the time embedding, in radians over [0, 1]."""
    w_conditioned: bool = False
    w_embedding: str = "fourier"
    num_outputs: int = 1
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def misfits(self, shape: tuple[int, ...]) -> Iterator[str]:
        """Yields a message, beginning with the option, for each option that doesn't fit this shape."""
        levels = len(self.channel_multipliers)
        if not levels:
            yield "channel_multipliers is empty: give one for each level"
            return
        yield from undivided("patch_size", self.patch_size, sides(shape))
        halved = self.patch_size * 2 ** (levels - 1)
        if any(side % halved for side in sides(shape).values()):
            yield (
                f"channel_multipliers has {levels} levels, and a side of {' x '.join(map(str, shape))} "
                f"can't be halved {levels - 1} times: give fewer levels"
            )
        attending = {self.channel_multipliers[-1]}
        for level, multiplier in enumerate(self.channel_multipliers):
            if shape[0] // (self.patch_size * 2**level) in self.attention_resolutions:
                attending.add(multiplier)
        for multiplier in sorted(attending):
            channels = {f"channels of {multiplier} times width": multiplier * self.width}
            yield from undivided("head_width", self.head_width, channels)

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

        H and W are multiples of patch_size 2^(levels-1).
        """
        # Argument 3 is `train`, a Python bool rather than an array.
        residual_block = rematerialized(ResidualBlock, self.remat, static_argnums=(3,))
        attention_block = rematerialized(AttentionBlock, self.remat)

        embedding = nn.swish(
            Conditioning(
                self.embedding_width,
                self.num_classes,
                self.w_conditioned,
                sinusoid_width=self.width,
                w_embedding=self.w_embedding,
                time_scale=self.time_scale,
                dtype=self.dtype,
                name="conditioning",
            )(log_snr, condition["label"], w)
        )

        def residual(
            image: jax.Array, level: int, name: str, resampling: str | None = None
        ) -> jax.Array:
            channels = self.width * self.channel_multipliers[level]
            block = residual_block(channels, self.dropout, self.dtype, resampling, name=name)
            return block(image, embedding, train)

        def attention(image: jax.Array, name: str) -> jax.Array:
            return attention_block(self.head_width, self.dtype, name=f"{name}_attention")(image)

        def block(image: jax.Array, level: int, name: str) -> jax.Array:
            image = residual(image, level, name)
            wanted = image.shape[1] in self.attention_resolutions
            return attention(image, name) if wanted else image

        last_level = len(self.channel_multipliers) - 1
        image = to_patches(z, self.patch_size)
        image = nn.Conv(self.width, (3, 3), dtype=jnp.float32, name="input")(image)
        skips = [image]
        for level in range(last_level + 1):
            for index in range(self.blocks_per_level):
                image = block(image, level, f"down_{level}_{index}")
                skips.append(image)
            if level < last_level:
                image = residual(image, level, f"down_{level}", "down")
                skips.append(image)

        image = attention(residual(image, last_level, "middle_0"), "middle")
        image = residual(image, last_level, "middle_1")

        for level in reversed(range(last_level + 1)):
            for index in range(self.blocks_per_level + 1):
                image = jnp.concatenate([image, skips.pop()], axis=-1)
                image = block(image, level, f"up_{level}_{index}")
            if level > 0:
                image = residual(image, level, f"up_{level}", "up")

        image = nn.swish(group_norm(image.shape[-1], "output_norm")(image))
        image = nn.Conv(
            self.num_outputs * self.patch_size**2 * z.shape[-1],
            (3, 3),
            kernel_init=nn.initializers.zeros,
            dtype=jnp.float32,
            name="output",
        )(image)
        return from_patches(image, self.patch_size)
