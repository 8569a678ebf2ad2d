"""Tokenizers of a fixed length: CLIP's byte-level BPE and BERT's WordPiece.

Both follow the rules that their published vocabularies were made with (Radford et al. 2021; Devlin et
al. 2019), as the library `tokenizers` implements them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from guided_distill.errors import UserError, needing
from guided_distill.files import is_text
from guided_distill.formats.json_files import read_json, read_model_text

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)

_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
# A word in CLIP: a special token, an English contraction, letters, one digit, or other symbols.
_CLIP_WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_BERT_MARKS = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Tokenizes prompts, padded or truncated to `length` tokens, including the start and end tokens.

    start, end, pad: the ids of the start, end and padding tokens.
    """

    vocabulary: tokenizers.Tokenizer
    length: int
    start: int
    end: int
    pad: int

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts [n] -> (token ids int32 [n, length], mask bool [n, length]: True up to the end token).

        If a prompt is too long, a warning quotes the rest. Raises UserError if a prompt isn't text.
        """
        for prompt in prompts:
            if not is_text(prompt):
                raise UserError(
                    f"the prompt {prompt!a} can't be encoded in UTF-8: give a valid string"
                )
        tokens = np.full((len(prompts), self.length), self.pad, np.int32)
        mask = np.zeros(tokens.shape, bool)
        most = self.length - 2
        encoded = self.vocabulary.encode_batch(list(prompts), add_special_tokens=False)
        for row, (prompt, words) in enumerate(zip(prompts, encoded, strict=True)):
            if len(words.ids) > most:
                log.warning(
                    "a prompt has %d tokens, but the text encoder takes %d, so the rest is ignored: %r",
                    len(words.ids),
                    most,
                    prompt[words.offsets[most][0] :],
                )
            whole = [self.start, *words.ids[:most], self.end]
            tokens[row, : len(whole)] = whole
            mask[row, : len(whole)] = True
        return tokens, mask


def clip_tokenizer(folder: epath.Path) -> Tokenizer:
    """Reads the tokenizer of a diffusers model from its folder `tokenizer`.

    Its length is model_max_length. The padding token is <|endoftext|> in Stable Diffusion 1 and "!" in 2.
    As in transformers, if tokenizer_config.json lists the tokens added to the vocabulary, it also names
    the special tokens; in older folders, added_tokens.json and special_tokens_map.json do.

    Raises UserError if a file is missing or can't be read, or if an added token's id doesn't fit.
    """
    where = folder / "tokenizer_config.json"
    config = read_json(where)
    length = config.get("model_max_length")
    if not isinstance(length, int) or not 2 <= length <= 4096:
        raise UserError(
            f"{where} has model_max_length {length}: set it to the text encoder's "
            "max_position_embeddings, which is 77 in Stable Diffusion"
        )
    named, special = dict(config), folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and special.exists():
        named |= read_json(special)
    marks = [
        _content(named.get(key, default), f"{folder}: {key}")
        for key, default in (
            ("bos_token", _CLIP_START),
            ("eos_token", _CLIP_END),
            ("pad_token", _CLIP_END),
        )
    ]
    vocabulary = _clip_vocabulary(folder)
    _add_tokens(vocabulary, _added_tokens(folder, config, marks), folder)
    start, end, pad = (_number(vocabulary, mark, folder) for mark in marks)
    # If "!" is the padding token, it must also be a token by itself in prompts.
    vocabulary.add_special_tokens(marks)
    return Tokenizer(vocabulary, length, start=start, end=end, pad=pad)


def wordpiece_tokenizer(file: epath.Path, length: int) -> Tokenizer:
    """Reads the tokenizer of an uncased BERT from its vocab.txt, which holds one token per line.

    Raises UserError if the file can't be read or lacks BERT's special tokens.
    """
    tokenizers = _library()
    words = read_model_text(file).splitlines()
    numbers = {word: number for number, word in enumerate(words)}
    vocabulary = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(numbers, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    vocabulary.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    start, end, pad, *_ = (_number(vocabulary, mark, file) for mark in _BERT_MARKS)
    vocabulary.add_special_tokens(list(_BERT_MARKS))
    return Tokenizer(vocabulary, length, start=start, end=end, pad=pad)


def _library() -> Any:
    with needing("tokenizers", extra="text", by="a text encoder"):
        import tokenizers
    return tokenizers


def _clip_vocabulary(folder: epath.Path) -> tokenizers.Tokenizer:
    tokenizers = _library()
    if not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists():
        try:
            vocabulary = tokenizers.Tokenizer.from_str(read_model_text(folder / "tokenizer.json"))
        except Exception as error:  # The library's errors have no class of their own.
            raise UserError(
                f"{folder}/tokenizer.json can't be read ({error}): get the tokenizer's folder again"
            ) from error
        vocabulary.no_padding()
        vocabulary.no_truncation()
        return vocabulary
    numbers = read_json(folder / "vocab.json")
    lines = read_model_text(folder / "merges.txt").splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#version")]
    try:
        merges = [(first, second) for first, second in pairs]
        model = tokenizers.models.BPE(
            numbers, merges, end_of_word_suffix="</w>", unk_token=_CLIP_END, fuse_unk=False
        )
    except Exception as error:  # As above.
        raise UserError(
            f"{folder}: vocab.json and merges.txt don't fit each other ({error}): get the tokenizer's "
            f"folder again"
        ) from error
    vocabulary = tokenizers.Tokenizer(model)
    vocabulary.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.NFC(),
            tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            tokenizers.normalizers.Lowercase(),
        ]
    )
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(_CLIP_WORD), behavior="removed", invert=True
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return vocabulary


def _added_tokens(
    folder: epath.Path, config: Mapping[str, Any], marks: Collection[str]
) -> dict[int, tokenizers.AddedToken]:
    """The tokens added to the vocabulary, such as those of textual inversion, by their ids."""
    where = folder / "tokenizer_config.json"
    if (decoder := config.get("added_tokens_decoder")) is not None:
        return {
            _whole(number, where): _token(token, where)
            for number, token in _object(decoder, where).items()
        }
    added = {}
    if (where := folder / "added_tokens.json").exists():
        for token, number in read_json(where).items():
            is_mark = token in marks
            added[_whole(number, where)] = _library().AddedToken(
                token, normalized=not is_mark, special=is_mark
            )
    return added


def _add_tokens(
    vocabulary: tokenizers.Tokenizer, added: Mapping[int, tokenizers.AddedToken], folder: epath.Path
) -> None:
    for number, token in sorted(added.items()):
        vocabulary.add_tokens([token])
        if (given := vocabulary.token_to_id(token.content)) != number:
            raise UserError(
                f"{folder}: the added token {token.content} has the id {number}, but the vocabulary "
                f"gives it {given}: get the tokenizer's folder again"
            )


def _token(token: Any, where: epath.Path) -> tokenizers.AddedToken:
    content = _content(token, f"{where}: a token of added_tokens_decoder")
    flags = {name: token[name] for name in _TOKEN_FLAGS if name in _object(token, where)}
    if not all(isinstance(value, bool) for value in flags.values()):
        raise UserError(
            f"{where}: the added token {content} must have true or false for {', '.join(flags)}"
        )
    return _library().AddedToken(content, **flags)


def _object(value: Any, where: epath.Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: added_tokens_decoder must be an object with one object per id")
    return value


def _whole(number: Any, where: epath.Path) -> int:
    if isinstance(number, bool) or not str(number).isdecimal():
        raise UserError(f"{where} gives an added token the id {number!r}: make it a whole number")
    return int(number)


def _content(token: Any, what: str) -> str:
    """A token's text, which the files hold as a string or in an object."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise UserError(
            f"{what} is {content!r}, but must be a string: get the tokenizer's folder again"
        )
    return content


def _number(vocabulary: tokenizers.Tokenizer, token: str, source: epath.Path) -> int:
    number = vocabulary.token_to_id(token)
    if number is None:
        raise UserError(f"{source} has no token {token}: get the whole vocabulary")
    return number
