"""CLIP (Radford et al. 2021) as an extractor: features of images, and the CLIP score of captions.

The user supplies the weights: a folder of transformers' CLIPModel, with its tokenizer.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from guided_distill.errors import UserError
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.extractors.pretrained import check_images
from guided_distill.formats.diffusers_folder import TEXT_WEIGHTS, read_weights
from guided_distill.formats.json_files import an_object, one_of, read_json, whole_number
from guided_distill.formats.torch_layout import to_tree
from guided_distill.models.stable_diffusion.attention import attend
from guided_distill.models.stable_diffusion.text_encoder import (
    ACTIVATIONS,
    CLIPTextEncoder,
    Perceptron,
)
from guided_distill.models.weights import weights_fingerprint
from guided_distill.places import path_named
from guided_distill.text.clip import CLIP_TEXT_DEFAULTS
from guided_distill.text.tokenizers import Tokenizer, clip_tokenizer

# Mean and standard deviation of the pixels, in [0, 1], with which all published weights were trained.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

BATCH = 32

# transformers' defaults for keys that a config leaves out.
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


class VisionAttention(nn.Module):
    """Self-attention of all patches."""

    num_heads: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> the same."""
        project = functools.partial(nn.Dense, hidden.shape[-1])
        attended = attend(
            project(name="q_proj")(hidden),
            project(name="k_proj")(hidden),
            project(name="v_proj")(hidden),
            num_heads=self.num_heads,
        )
        return project(name="out_proj")(attended)


class VisionLayer(nn.Module):
    """Self-attention and a perceptron, each residual, with a layer norm before it."""

    num_heads: int
    intermediate_size: int
    activation: str

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> the same."""
        attention = VisionAttention(self.num_heads, name="self_attn")
        perceptron = Perceptron(self.intermediate_size, self.activation, jnp.float32, name="mlp")
        hidden += attention(_norm("layer_norm1")(hidden))
        return hidden + perceptron(_norm("layer_norm2")(hidden))


class _VisionLayers(nn.Module):
    count: int
    layer: Any

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        for index in range(self.count):
            hidden = self.layer(name=f"layers_{index}")(hidden)
        return hidden


class _ClassToken(nn.Module):
    """A vector for the whole image. It is named bias because `clip_params` maps weights to that name."""

    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("bias", nn.initializers.normal(), (self.width,))


class _PatchEmbeddings(nn.Module):
    width: int
    patch_size: int

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        size = (self.patch_size, self.patch_size)
        patches = nn.Conv(self.width, size, size, "VALID", use_bias=False, name="patch_embedding")(
            pixels
        )
        patches = patches.reshape(len(pixels), -1, self.width)
        whole = _ClassToken(self.width, name="class_embedding")()
        whole = jnp.broadcast_to(whole, (len(pixels), 1, self.width))
        hidden = jnp.concatenate([whole, patches], axis=1)
        count = hidden.shape[1]
        return hidden + nn.Embed(count, self.width, name="position_embedding")(
            jnp.arange(count)[None]
        )


class VisionTransformer(nn.Module):
    """Maps each image to a vector; the fields are those of transformers' CLIPVisionConfig."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, image_size, image_size, 3], normalized -> [B, hidden_size]."""
        hidden = _PatchEmbeddings(self.hidden_size, self.patch_size, name="embeddings")(pixels)
        layer = functools.partial(
            VisionLayer, self.num_attention_heads, self.intermediate_size, self.hidden_act
        )
        # The spelling of published weights.
        hidden = _norm("pre_layrnorm")(hidden)
        hidden = _VisionLayers(self.num_hidden_layers, layer, name="encoder")(hidden)
        return _norm("post_layernorm")(hidden[:, 0])


class CLIP(nn.Module):
    """Maps images and texts to vectors [B, projection_dim] of length 1."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    projection_dim: int

    def setup(self) -> None:
        """Create both towers."""
        self.text_model = CLIPTextEncoder(**self.text)
        self.vision_model = VisionTransformer(**self.vision)
        self.text_projection = nn.Dense(self.projection_dim, use_bias=False)
        self.visual_projection = nn.Dense(self.projection_dim, use_bias=False)

    def __call__(self, pixels: jax.Array, tokens: jax.Array, end: jax.Array) -> Any:
        """Embed images and texts; arguments as below."""
        return self.embed_images(pixels), self.embed_texts(tokens, end)

    def embed_images(self, pixels: jax.Array) -> jax.Array:
        """Embed pixels [B, image_size, image_size, 3], normalized."""
        return _unit(self.visual_projection(self.vision_model(pixels)))

    def embed_texts(self, tokens: jax.Array, end: jax.Array) -> jax.Array:
        """Embed tokens [B, L]; a text's vector comes from the state of its first `end` token."""
        hidden = self.text_model(tokens)
        place = jnp.argmax(tokens == end, axis=1)
        state = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
        return _unit(self.text_projection(state))


@dataclass(frozen=True, eq=False)
class ClipExtractor(Extractor):
    """CLIP's image encoder, and its text encoder to compare images with texts. It has no classes."""

    network: CLIP = field(kw_only=True)
    tokenizer: Tokenizer = field(kw_only=True, repr=False)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts [n] -> float32 vectors [n, width] of length 1, comparable with the features of images."""
        tokens, _ = self.tokenizer(texts)
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(texts), BATCH):
            some = tokens[start : start + BATCH]
            padded = np.pad(some, [(0, BATCH - len(some)), (0, 0)])
            parts.append(np.asarray(self._embed(self._placed, padded))[: len(some)])
        return np.concatenate(parts)

    @functools.cached_property
    def _embed(self) -> Any:
        def embed(params: Any, tokens: jax.Array) -> Any:
            with jax.default_matmul_precision("highest"):
                return self.network.apply(
                    {"params": params}, tokens, jnp.int32(self.tokenizer.end), method="embed_texts"
                )

        return jax.jit(embed)


def preprocess(images: jax.Array, side: int) -> jax.Array:
    """Images [B, H, W, 1 or 3] in [-1, 1] -> pixels [B, side, side, 3], normalized.

    The shorter side is resized to `side` bicubically, with antialiasing as in Pillow; the longer side is
    cropped to its centre, as transformers' CLIPImageProcessor does.
    """
    images = jnp.broadcast_to(images, (*images.shape[:-1], 3))
    height, width = (side * each // min(images.shape[1:3]) for each in images.shape[1:3])
    top, left = (height - side) // 2, (width - side) // 2
    resized = jax.image.resize(
        (images + 1) / 2, (len(images), height, width, 3), "cubic", antialias=True
    )[:, top : top + side, left : left + side]
    mean, std = (jnp.array(each)[None, None, None] for each in (PIXEL_MEAN, PIXEL_STD))
    return (jnp.clip(resized, 0, 1) - mean) / std


def clip_extractor(shape: tuple[int, ...], path: str) -> ClipExtractor:
    """The extractor for images of `shape` [H, W, C], from a folder of transformers' CLIPModel.

    Raises UserError if a file is missing, can't be read or isn't CLIP's, or if the data are not images.
    """
    check_images("clip", shape)
    folder = path_named(path)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give one that holds transformers' CLIPModel")
    where = folder / "config.json"
    config = read_json(where)
    one_of(config.get("model_type"), ("clip",), "model_type", where)
    text, vision = (
        _fields(an_object(config.get(part), part, where), defaults, where)
        for part, defaults in (
            ("text_config", CLIP_TEXT_DEFAULTS),
            ("vision_config", _VISION_DEFAULTS),
        )
    )
    width = whole_number(config.get("projection_dim", 512), "projection_dim", where)
    network = CLIP(text=text, vision=vision, projection_dim=width)
    params = clip_params(network, read_weights(folder, TEXT_WEIGHTS), source=folder)
    return ClipExtractor(
        name=f"clip-{weights_fingerprint(network, params)[:8]}",
        width=network.projection_dim,
        own_classes=False,
        apply=functools.partial(_apply, network),
        params=params,
        batch_size=BATCH,
        network=network,
        tokenizer=clip_tokenizer(folder),
    )


def _apply(network: CLIP, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    with jax.default_matmul_precision("highest"):
        pixels = preprocess(images, network.vision["image_size"])
        features: Any = network.apply({"params": params}, pixels, method="embed_images")
    return features, jnp.zeros((len(images), 0))


def clip_params(
    network: CLIP, tensors: Mapping[str, np.ndarray], *, source: epath.Path
) -> Mapping[str, Any]:
    """The network's weights from tensors with transformers' names. Raises UserError if they don't fit."""
    side = network.vision["image_size"]
    inputs = (
        jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    template = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    named = {
        f"{name}.bias" if name.endswith(".class_embedding") else name: tensor
        for name, tensor in tensors.items()
        if name != "logit_scale" and not name.endswith(".position_ids")
    }
    return to_tree(named, template, source=source)


def _fields(
    config: Mapping[str, Any], defaults: Mapping[str, int], where: epath.Path
) -> dict[str, Any]:
    activation = config.get("hidden_act", "quick_gelu")
    one_of(activation, ACTIVATIONS, "hidden_act", where)
    sizes = {
        key: whole_number(config.get(key, default), key, where) for key, default in defaults.items()
    }
    return {**sizes, "hidden_act": activation}


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
