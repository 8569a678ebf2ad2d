"""CLIP's text encoder (Radford et al. 2021), read from the folder of a diffusers model."""

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_folder import TEXT_WEIGHTS, read_component
from guided_distill.formats.json_files import divides, must, one_of, read_json, whole_number
from guided_distill.models.registry import Params
from guided_distill.models.stable_diffusion.text_encoder import ACTIVATIONS, CLIPTextEncoder
from guided_distill.text.encoder import TextEncoder
from guided_distill.text.tokenizers import clip_tokenizer

# transformers' defaults for keys that are missing in config.json.
CLIP_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}


def load_clip(folder: epath.Path, *, name: str) -> TextEncoder:
    """Loads the encoder in the folders `text_encoder` and `tokenizer` of a diffusers model.

    It returns the normalized states of the last layer. Its attention doesn't mask padding, because Stable
    Diffusion was trained that way. name: see `TextEncoder`.

    Raises UserError if one of the folders is missing or can't be read, or if they don't fit each other.
    """
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder} has no folder {part}: give clip:DIR with the folder of a diffusers model"
            )
    network, params = read_text_encoder(folder / "text_encoder")
    tokenizer = clip_tokenizer(folder / "tokenizer")
    words = tokenizer.vocabulary.get_vocab_size()
    if words > network.vocab_size or tokenizer.length > network.max_position_embeddings:
        raise UserError(
            f"{folder}: the tokenizer has {words} words and a length of {tokenizer.length}, but the text "
            f"encoder takes {network.vocab_size} and {network.max_position_embeddings}: take both "
            f"folders from the same model"
        )

    def hidden(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            states: Any = network.apply({"params": params}, tokens)
        return states

    return TextEncoder(name, (tokenizer.length, network.hidden_size), tokenizer, hidden, params)


def read_text_encoder(folder: epath.Path) -> tuple[CLIPTextEncoder, Params]:
    """Reads the CLIP text encoder in a folder, usually `text_encoder`, and its weights.

    Raises UserError, naming the key or the tensors, if the encoder isn't supported.
    """
    config, where = read_json(folder / "config.json"), folder / "config.json"
    one_of(config.get("model_type"), ("clip_text_model",), "model_type", where)
    must(config.get("layer_norm_eps", 1e-5), 1e-5, "layer_norm_eps", where)
    activation = config.get("hidden_act", "quick_gelu")
    one_of(activation, ACTIVATIONS, "hidden_act", where)
    numbers: dict[str, Any] = {
        key: whole_number(config.get(key, default), key, where)
        for key, default in CLIP_TEXT_DEFAULTS.items()
    }
    module = CLIPTextEncoder(hidden_act=activation, **numbers)
    heads = numbers["num_attention_heads"]
    divides(heads, numbers["hidden_size"], "num_attention_heads", "hidden_size", where)
    tokens = jax.ShapeDtypeStruct((1, numbers["max_position_embeddings"]), jnp.int32)
    return module, read_component(module, tokens, folder, TEXT_WEIGHTS)
