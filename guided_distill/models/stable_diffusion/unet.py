"""The U-Net of latent diffusion (Rombach et al. 2022): Stable Diffusion 1 and 2, and ImageNet LDMs."""

import functools
from collections.abc import Iterator
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from guided_distill import kinds
from guided_distill.diffusion.guidance import Condition
from guided_distill.models.embeddings import W_FEATURES, Features
from guided_distill.models.remat import Remat, rematerialized
from guided_distill.models.sizes import misfit_groups, misfit_levels, undivided
from guided_distill.models.stable_diffusion.attention import SpatialTransformer
from guided_distill.models.stable_diffusion.blocks import (
    Downsample,
    Level,
    Middle,
    ResnetBlock,
    Upsample,
)
from guided_distill.models.stable_diffusion.embeddings import (
    TimestepEmbedding,
    check_w,
    time_sinusoid,
)


class UNet2DCondition(nn.Module):
    """Down, middle and up, with a skip connection from every step on the way down to its match going up.

    Fields have diffusers' names where those are accurate. A label becomes a context of length one and
    width cross_attention_dim; label num_classes is the null label. w_embedding: diffusers uses "fourier".
    """

    head: ClassVar[str] = "conv_out"
    takes_timesteps: ClassVar[bool] = True
    conditions: ClassVar[tuple[str, ...]] = ("label", "text", "inpaint")

    block_out_channels: tuple[kinds.Width, ...] = (320, 640, 1280, 1280)
    """Channels of each level, from full resolution down."""
    cross_attention_levels: tuple[kinds.Whole, ...] = (0, 1, 2)
    """Levels that attend, as indices into block_out_channels; the middle always attends."""
    num_attention_heads: tuple[kinds.Width, ...] = (8, 8, 8, 8)
    """Attention heads at each level; diffusers calls it attention_head_dim."""
    layers_per_block: kinds.Count = 2
    """Residual blocks of each level on the way down; there is one more on the way up."""
    cross_attention_dim: kinds.Width = 768
    """Width of the text encoder's states, or of an embedded label."""
    use_linear_projection: bool = False
    """Whether attention projects by dense layers, as in Stable Diffusion 2, or by convolutions."""
    norm_num_groups: kinds.Width = 32
    """Groups of every group normalization."""
    num_classes: int = 0
    w_conditioned: bool = False
    w_embedding: str = "fourier"
    w_embedding_width: Features = 256
    """Width of the features of w, which diffusers calls time_cond_proj_dim."""
    num_outputs: int = 1
    dropout: float = 0.0
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""
    dtype: DTypeLike = jnp.float32

    def misfits(self, shape: tuple[int, ...]) -> Iterator[str]:
        """Yields a message, beginning with the option, for each option that is wrong for any shape."""
        levels, heads = self.block_out_channels, self.num_attention_heads
        if not levels or len(levels) != len(heads):
            yield (
                f"num_attention_heads has {len(heads)} numbers and block_out_channels has {len(levels)}: "
                f"give each one number per level"
            )
            return
        yield from misfit_levels("cross_attention_levels", self.cross_attention_levels, levels)
        yield from misfit_groups(self.norm_num_groups, levels)
        for level in sorted({*self.cross_attention_levels, len(levels) - 1}):
            channels = {f"block_out_channels[{level}]": levels[level]}
            yield from undivided(f"num_attention_heads[{level}]", heads[level], channels)

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

        condition: "text" [B, L, D] or "label" [B]. An in-painting network also takes "inpaint"
        [B, H, W, 1 + C]: the mask (1 where to paint) and the masked image's latents. Raises ValueError if
        w is given but the network isn't conditioned on w, or the reverse.
        """
        check_w(w, w_conditioned=self.w_conditioned)
        embedding = self._embedding(time, w)
        context = self._context(condition)
        attention = functools.partial(
            rematerialized(SpatialTransformer, self.remat),
            norm_num_groups=self.norm_num_groups,
            use_linear_projection=self.use_linear_projection,
            dtype=self.dtype,
        )
        resnet = functools.partial(
            rematerialized(ResnetBlock, self.remat),
            norm_num_groups=self.norm_num_groups,
            norm_eps=1e-5,
            dropout=self.dropout if train else 0.0,
            dtype=self.dtype,
        )
        attentions = [
            functools.partial(attention, heads) if level in self.cross_attention_levels else None
            for level, heads in enumerate(self.num_attention_heads)
        ]
        last_level = len(self.block_out_channels) - 1

        image = jnp.concatenate([z, condition["inpaint"]], axis=-1) if "inpaint" in condition else z
        image = nn.Conv(self.block_out_channels[0], (3, 3), dtype=self.dtype, name="conv_in")(image)
        skips = [image]
        for level, channels in enumerate(self.block_out_channels):
            downsampler = functools.partial(Downsample, (1, 1), self.dtype)
            image, steps = Level(
                channels,
                self.layers_per_block,
                resnet,
                attentions[level],
                downsampler=downsampler if level < last_level else None,
                name=f"down_blocks_{level}",
            )(image, embedding, context)
            skips += steps

        image = Middle(
            self.block_out_channels[-1],
            resnet,
            functools.partial(attention, self.num_attention_heads[-1]),
            name="mid_block",
        )(image, embedding, context)

        num_layers = self.layers_per_block + 1
        for index, level in enumerate(reversed(range(last_level + 1))):
            skips, taken = skips[:-num_layers], skips[-num_layers:]
            upsampler = None
            if level > 0:
                _, rows, columns, _ = skips[-1].shape
                upsampler = functools.partial(Upsample, (rows, columns), self.dtype)
            image, _ = Level(
                self.block_out_channels[level],
                num_layers,
                resnet,
                attentions[level],
                upsampler=upsampler,
                name=f"up_blocks_{index}",
            )(image, embedding, context, taken)

        image = nn.GroupNorm(
            self.norm_num_groups, epsilon=1e-5, dtype=self.dtype, name="conv_norm_out"
        )(image)
        return nn.Conv(
            self.num_outputs * z.shape[-1],
            (3, 3),
            kernel_init=nn.initializers.zeros,
            dtype=jnp.float32,
            name="conv_out",
        )(nn.swish(image))

    def _embedding(self, time: jax.Array, w: jax.Array | None) -> jax.Array:
        """The embedding [B, 4 block_out_channels[0]] that every residual block projects and adds."""
        width = self.block_out_channels[0]
        if w is not None:
            features = W_FEATURES[self.w_embedding]
            w = features(w.astype(jnp.float32), self.w_embedding_width, scale=1000.0)
        embed = TimestepEmbedding(4 * width, self.dtype, name="time_embedding")
        return nn.swish(embed(time_sinusoid(time, width), w))

    def _context(self, condition: Condition) -> jax.Array:
        """The context [B, L, cross_attention_dim]."""
        if "text" in condition:
            return condition["text"]
        embed = nn.Embed(
            self.num_classes + 1, self.cross_attention_dim, dtype=self.dtype, name="class_embedder"
        )
        return embed(condition["label"])[:, None, :]
