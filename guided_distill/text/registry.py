"""Text encoders by name."""

from etils import epath

from guided_distill.errors import UserError
from guided_distill.text.clip import load_clip
from guided_distill.text.encoder import TextEncoder
from guided_distill.text.minilm import load_minilm

KNOWN = ("minilm:DIR", "clip:DIR")


def load_text_encoder(name: str) -> TextEncoder:
    """Opens one of `KNOWN`.

    DIR holds, for minilm, what `guided-distill prepare minilm` put there; for clip, the folders
    text_encoder and tokenizer of a diffusers model.

    Raises UserError if there is no such encoder, or for what is in DIR.
    """
    kind, _, folder = name.partition(":")
    if kind == "minilm" and folder:
        return load_minilm(epath.Path(folder), name=name)
    if kind == "clip" and folder:
        return load_clip(epath.Path(folder), name=name)
    raise UserError(f"unknown text encoder {name!r}: use one of {', '.join(KNOWN)}")
