"""CLIP's text encoder (Radford et al. 2021), as Stable Diffusion's folders hold it."""

from typing import Any

import jax
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.companions import read_text_encoder
from guided_distill.text.encoder import TextEncoder
from guided_distill.text.tokenizers import clip_tokenizer


def load_clip(folder: epath.Path, *, name: str) -> TextEncoder:
    """The encoder in the folders `text_encoder` and `tokenizer` of a diffusers model.

    Its states are those of the last layer, normalized; padding is attended to like any token, as
    Stable Diffusion was trained.

    Raises UserError if a part is missing, can't be read, or doesn't fit the other.
    """
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise UserError(
                f"{folder} has no folder {part}: give clip: the folder of a diffusers model"
            )
    network, params = read_text_encoder(folder / "text_encoder")
    tokenizer = clip_tokenizer(folder / "tokenizer")
    words = tokenizer.vocabulary.get_vocab_size()
    if words > network.vocab_size or tokenizer.length > network.max_position_embeddings:
        raise UserError(
            f"{folder}: the tokenizer has {words} words and a length of {tokenizer.length}, and the text "
            f"encoder takes {network.vocab_size} and {network.max_position_embeddings}: they are of "
            "different models"
        )

    def hidden(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            states: Any = network.apply({"params": params}, tokens)
        return states

    return TextEncoder(name, (tokenizer.length, network.hidden_size), tokenizer, hidden, params)
