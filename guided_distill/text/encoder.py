"""Frozen text encoders."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from guided_distill.text.tokenizers import Tokenizer

Hidden = Callable[..., jax.Array]
"""f(params, tokens [B, L], mask [B, L]) -> [B, L, D]."""

_BATCH = 32


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A frozen encoder of prompts.

    name: the argument of `load_text_encoder` that loads it. shape: (L, D), the number of tokens and the
    width of each token's state.
    """

    name: str
    shape: tuple[int, int]
    tokenizer: Tokenizer = field(repr=False)
    hidden: Hidden = field(repr=False)
    params: Mapping[str, Any] = field(repr=False)

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts [n] -> the last layer's states, float32 [n, L, D], including those of padding.

        A prompt that is too long is truncated with a warning.
        """
        parts = [states for states, _ in self._batches(prompts)]
        return np.concatenate(parts) if parts else np.zeros((0, *self.shape), np.float32)

    def _batches(self, prompts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the states [b, L, D] and the mask [b, L] of each batch.

        Batches are padded to a power of two, so that there are few compilations and small batches stay
        small.
        """
        tokens, mask = self.tokenizer(prompts)
        for start in range(0, len(tokens), _BATCH):
            batch = slice(start, start + _BATCH)
            count = len(tokens[batch])
            padding = [(0, (1 << (count - 1).bit_length()) - count), (0, 0)]
            states = self._run(
                self.params, np.pad(tokens[batch], padding), np.pad(mask[batch], padding)
            )
            yield np.asarray(states)[:count], mask[batch]

    @functools.cached_property
    def _run(self) -> Hidden:
        return jax.jit(self.hidden)


class SentenceEncoder(TextEncoder):
    """A text encoder that can also embed a whole prompt as one vector."""

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts [n] -> unit vectors, float32 [n, D]: the normalized mean of the states without padding.

        sentence-transformers pools all-MiniLM-L6-v2 in the same way (Reimers & Gurevych 2019).
        """
        parts = [np.zeros((0, self.shape[1]), np.float32)]
        for states, mask in self._batches(prompts):
            mean = np.einsum("nld,nl->nd", states, mask) / mask.sum(1, keepdims=True)
            parts.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(parts)
