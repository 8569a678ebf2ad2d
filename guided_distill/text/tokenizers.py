"""Prompts to token numbers of a fixed length: CLIP's byte-level BPE, BERT's WordPiece.

The rules of both are those that their published vocabularies were made with (Radford et al. 2021; Devlin
et al. 2019), carried out by the library `tokenizers`.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import models, normalizers, pre_tokenizers

from guided_distill.errors import UserError

log = logging.getLogger(__name__)

_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
# What CLIP calls a word: its own marks, English endings, letters, one digit, or other signs.
_CLIP_WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
_BERT_MARKS = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Fills every prompt up to, or cuts it to, `length` tokens, start and end among them.

    start, end, pad: numbers of the tokens around a prompt and after it.
    """

    vocabulary: tokenizers.Tokenizer
    length: int
    start: int
    end: int
    pad: int

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts [n] -> (tokens int32 [n, length], mask bool [n, length]: True up to the end token).

        What is cut from a prompt that is too long is told in a warning.
        """
        tokens = np.full((len(prompts), self.length), self.pad, np.int32)
        mask = np.zeros(tokens.shape, bool)
        room = self.length - 2
        encoded = self.vocabulary.encode_batch(list(prompts), add_special_tokens=False)
        for row, (prompt, words) in enumerate(zip(prompts, encoded, strict=True)):
            if len(words.ids) > room:
                log.warning(
                    "a prompt has %d tokens and the text encoder takes %d, so this is cut from it: %r",
                    len(words.ids),
                    room,
                    prompt[words.offsets[room][0] :],
                )
            whole = [self.start, *words.ids[:room], self.end]
            tokens[row, : len(whole)] = whole
            mask[row, : len(whole)] = True
        return tokens, mask


def clip_tokenizer(folder: epath.Path) -> Tokenizer:
    """The tokenizer of a diffusers model, from its folder `tokenizer`.

    Its length is model_max_length. Which token fills up differs: <|endoftext|> in Stable Diffusion 1,
    "!" in 2; special_tokens_map.json says it, or else tokenizer_config.json.

    Raises UserError if a file is missing or can't be read.
    """
    config = _read_json(folder / "tokenizer_config.json")
    named = dict(config)
    if (special := folder / "special_tokens_map.json").exists():
        named |= _read_json(special)
    length = config.get("model_max_length")
    if not isinstance(length, int) or not 2 <= length <= 4096:
        raise UserError(
            f"{folder}/tokenizer_config.json has the model_max_length {length}: set it to the text "
            "encoder's max_position_embeddings, which is 77 in Stable Diffusion"
        )
    vocabulary = _clip_vocabulary(folder)
    marks = [
        _content(named.get(key, default))
        for key, default in (
            ("bos_token", _CLIP_START),
            ("eos_token", _CLIP_END),
            ("pad_token", _CLIP_END),
        )
    ]
    start, end, pad = (_number(vocabulary, mark, folder) for mark in marks)
    # So "!", where it fills up, is a token by itself in prompts too.
    vocabulary.add_special_tokens(marks)
    return Tokenizer(vocabulary, length, start=start, end=end, pad=pad)


def wordpiece_tokenizer(file: epath.Path, length: int) -> Tokenizer:
    """The tokenizer of an uncased BERT, from its vocab.txt: a token a line.

    Raises UserError if the file can't be read or lacks BERT's own tokens.
    """
    words = _read_text(file).splitlines()
    numbers = {word: number for number, word in enumerate(words)}
    vocabulary = tokenizers.Tokenizer(
        models.WordPiece(numbers, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    vocabulary.normalizer = normalizers.BertNormalizer(lowercase=True)
    vocabulary.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    start, end, pad, *_ = (_number(vocabulary, mark, file) for mark in _BERT_MARKS)
    vocabulary.add_special_tokens(list(_BERT_MARKS))
    return Tokenizer(vocabulary, length, start=start, end=end, pad=pad)


def _clip_vocabulary(folder: epath.Path) -> tokenizers.Tokenizer:
    if not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists():
        try:
            vocabulary = tokenizers.Tokenizer.from_str(_read_text(folder / "tokenizer.json"))
        except Exception as error:  # The library's errors have no class of their own.
            raise UserError(f"{folder}/tokenizer.json can't be read: {error}") from error
        vocabulary.no_padding()
        vocabulary.no_truncation()
        return vocabulary
    numbers = _read_json(folder / "vocab.json")
    lines = _read_text(folder / "merges.txt").splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    try:
        merges = [(first, second) for first, second in pairs]
        model = models.BPE(
            numbers, merges, end_of_word_suffix="</w>", unk_token=_CLIP_END, fuse_unk=False
        )
    except Exception as error:  # As above.
        raise UserError(f"{folder}: vocab.json and merges.txt don't fit: {error}") from error
    vocabulary = tokenizers.Tokenizer(model)
    vocabulary.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return vocabulary


def _content(token: Any) -> str:
    """A token's text; the files give it by itself or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _number(vocabulary: tokenizers.Tokenizer, token: str, source: epath.Path) -> int:
    number = vocabulary.token_to_id(token)
    if number is None:
        raise UserError(f"{source} has no token {token}: is it the whole vocabulary?")
    return number


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): is the file whole?") from error


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give a folder that holds the tokenizer") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
