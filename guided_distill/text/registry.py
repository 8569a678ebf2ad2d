"""Text encoders by name."""

from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_folder import copy_folder
from guided_distill.formats.json_files import read_json, write_json
from guided_distill.places import path_named
from guided_distill.text.clip import load_clip
from guided_distill.text.encoder import TextEncoder
from guided_distill.text.minilm import LENGTH, load_minilm

KNOWN = ("minilm:DIR", "clip:DIR")
"""The text encoders that a config can name."""

COMPANIONS_PREFIX = "companions:"


def copy_text_encoder(name: str, out: epath.Path) -> dict[str, list[str]]:
    """Copies one of `KNOWN` into the folders text_encoder and tokenizer of `out`.

    Returns their entries for a diffusers model's index. Raises UserError if copying fails.
    """
    kind, _, folder = name.partition(":")
    if kind == "clip":
        for part in ("text_encoder", "tokenizer"):
            copy_folder(path_named(folder) / part, out / part)
        return {
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
    source = path_named(folder)
    copy_folder(source, out / "text_encoder", leave_out=("vocab.txt", "config.json"))
    # Without this key, diffusers doesn't pass the mask of the prompt's tokens to the encoder.
    config = read_json(source / "config.json") | {"use_attention_mask": True}
    write_json(out / "text_encoder" / "config.json", config)
    copy_folder(source, out / "tokenizer", leave_out=("model.safetensors", "config.json"))
    tokenizer = {"tokenizer_class": "BertTokenizer", "model_max_length": LENGTH}
    write_json(out / "tokenizer" / "tokenizer_config.json", tokenizer | {"do_lower_case": True})
    return {
        "text_encoder": ["transformers", "BertModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
    }


def load_text_encoder(name: str) -> TextEncoder:
    """Loads one of `KNOWN`, or companions:DIR, where DIR is beside an imported or trained model.

    For minilm, DIR is a folder written by `guided-distill prepare minilm`; for clip and companions, it
    holds the folders text_encoder and tokenizer of a diffusers model. Companions can be of either kind.

    Raises UserError if the encoder is unknown or the files in DIR can't be read.
    """
    kind, _, folder = name.partition(":")
    if name.startswith(COMPANIONS_PREFIX):
        parts = path_named(folder)
        config = read_json(parts / "text_encoder" / "config.json")
        if config.get("model_type") == "bert":
            vocabulary = parts / "tokenizer" / "vocab.txt"
            return load_minilm(parts / "text_encoder", name=name, vocabulary=vocabulary)
        kind = "clip"
    if kind == "minilm" and folder:
        return load_minilm(path_named(folder), name=name)
    if kind == "clip" and folder:
        return load_clip(path_named(folder), name=name)
    raise UserError(f"unknown text encoder {name!r}: use one of {', '.join(KNOWN)}")
