"""The pixel-space U-Net of the paper's line of work (Dhariwal & Nichol 2021; Salimans & Ho 2022)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from guided_distill.models.embeddings import Conditioning


def group_norm(channels: int, dtype: DTypeLike, name: str) -> nn.GroupNorm:
    """Group normalization with 32 groups, or as many as divide the channels."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4)
    return nn.GroupNorm(groups, dtype=dtype, name=name)


def resample(image: jax.Array, mode: str | None) -> jax.Array:
    """Halve by average pooling ("down"), double by repetition ("up"), or leave alone (None)."""
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
    def __call__(self, image: jax.Array, condition: jax.Array, *, train: bool) -> jax.Array:
        """image [B, H, W, C], condition [B, D] -> [B, H', W', channels]."""
        branch = nn.swish(group_norm(image.shape[-1], self.dtype, "norm_1")(image))
        branch = resample(branch, self.resampling)
        branch = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_1")(branch)
        modulation = nn.Dense(2 * self.channels, dtype=self.dtype, name="modulation")(condition)
        scale, shift = jnp.split(modulation[:, None, None, :], 2, axis=-1)
        branch = group_norm(self.channels, self.dtype, "norm_2")(branch) * (1.0 + scale) + shift
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
            skip = nn.Dense(self.channels, dtype=self.dtype, name="skip")(skip)
        return skip + branch


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, residual."""

    head_width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same; C is a multiple of head_width."""
        batch, channels = image.shape[0], image.shape[-1]
        normed = group_norm(channels, self.dtype, "norm")(image).reshape(batch, -1, channels)
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
    """Down, middle and up, with a skip from every block of the way down to its like on the way up.

    width: channels at full resolution; level k has width * channel_multipliers[k] at 1/2^k.
    attention_resolutions: the heights at which attention follows each residual block.
    """

    width: int
    channel_multipliers: tuple[int, ...]
    blocks_per_level: int
    attention_resolutions: tuple[int, ...]
    head_width: int
    embedding_width: int
    num_classes: int
    w_conditioned: bool = False
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        log_snr: jax.Array,
        label: jax.Array,
        w: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """z [B, H, W, C], H and W multiples of 2^(levels-1); log_snr, label, w [B] -> z's shape."""
        condition = nn.swish(
            Conditioning(
                self.embedding_width,
                self.num_classes,
                self.w_conditioned,
                dtype=self.dtype,
                name="conditioning",
            )(log_snr, label, w)
        )

        def block(
            image: jax.Array, level: int, name: str, resampling: str | None = None
        ) -> jax.Array:
            image = ResidualBlock(
                self.width * self.channel_multipliers[level],
                self.dropout,
                self.dtype,
                resampling,
                name=name,
            )(image, condition, train=train)
            if resampling is None and image.shape[1] in self.attention_resolutions:
                image = AttentionBlock(self.head_width, self.dtype, name=f"{name}_attention")(image)
            return image

        last_level = len(self.channel_multipliers) - 1
        image = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="input")(z)
        skips = [image]
        for level in range(last_level + 1):
            for index in range(self.blocks_per_level):
                image = block(image, level, f"down_{level}_{index}")
                skips.append(image)
            if level < last_level:
                image = block(image, level, f"down_{level}", "down")
                skips.append(image)

        image = block(image, last_level, "middle_0")
        image = block(image, last_level, "middle_1")

        for level in reversed(range(last_level + 1)):
            for index in range(self.blocks_per_level + 1):
                image = jnp.concatenate([image, skips.pop()], axis=-1)
                image = block(image, level, f"up_{level}_{index}")
            if level > 0:
                image = block(image, level, f"up_{level}", "up")

        image = nn.swish(group_norm(image.shape[-1], self.dtype, "output_norm")(image))
        return nn.Conv(
            z.shape[-1],
            (3, 3),
            kernel_init=nn.initializers.zeros,
            dtype=jnp.float32,
            name="output",
        )(image)
