"""all-MiniLM-L6-v2, a BERT (Devlin et al. 2019) with 6 layers and width 384, trained to embed sentences.

`prepare/minilm.py` downloads its files.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_folder import read_weights_file
from guided_distill.formats.json_files import divides, positive, read_json, whole_number
from guided_distill.formats.torch_layout import to_tree
from guided_distill.text.encoder import SentenceEncoder
from guided_distill.text.tokenizers import wordpiece_tokenizer

LENGTH = 32
"""Tokens per prompt, including the start and end tokens; the model would take up to 512."""


def _normalized(epsilon: float) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name="LayerNorm")


class BertAttention(nn.Module):
    """Residual attention of every token to the tokens in the mask, then normalization."""

    num_heads: int
    epsilon: float

    @nn.compact
    def __call__(self, states: jax.Array, mask: jax.Array) -> jax.Array:
        """states [B, L, D], mask [B, L] -> [B, L, D]."""
        attended = _SelfAttention(self.num_heads, name="self")(states, mask)
        return _Output(states.shape[-1], self.epsilon, name="output")(attended, states)


class _SelfAttention(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, states: jax.Array, mask: jax.Array) -> jax.Array:
        heads = (*states.shape[:2], self.num_heads, -1)
        queries, keys, values = (
            nn.Dense(states.shape[-1], name=name)(states).reshape(heads)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(queries, keys, values, mask=mask[:, None, None])
        return attended.reshape(states.shape)


class _Output(nn.Module):
    """Projects a branch, adds it to the states and normalizes the sum."""

    width: int
    epsilon: float

    @nn.compact
    def __call__(self, branch: jax.Array, states: jax.Array) -> jax.Array:
        branch = nn.Dense(self.width, name="dense")(branch)
        return _normalized(self.epsilon)(branch + states)


class _Intermediate(nn.Module):
    width: int

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        return nn.gelu(nn.Dense(self.width, name="dense")(states), approximate=False)


class BertLayer(nn.Module):
    """Attention and a perceptron, both residual and post-normalized."""

    num_heads: int
    intermediate_size: int
    epsilon: float

    @nn.compact
    def __call__(self, states: jax.Array, mask: jax.Array) -> jax.Array:
        """states [B, L, D], mask [B, L] -> [B, L, D]."""
        states = BertAttention(self.num_heads, self.epsilon, name="attention")(states, mask)
        branch = _Intermediate(self.intermediate_size, name="intermediate")(states)
        return _Output(states.shape[-1], self.epsilon, name="output")(branch, states)


class _Layers(nn.Module):
    count: int
    layer: Any

    @nn.compact
    def __call__(self, states: jax.Array, mask: jax.Array) -> jax.Array:
        for index in range(self.count):
            states = self.layer(name=f"layers_{index}")(states, mask)
        return states


class _Embeddings(nn.Module):
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    type_vocab_size: int
    epsilon: float

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = functools.partial(nn.Embed, features=self.hidden_size)
        words = embed(self.vocab_size, name="word_embeddings")(tokens)
        positions = embed(self.max_position_embeddings, name="position_embeddings")(
            jnp.arange(tokens.shape[1])[None]
        )
        # BERT takes pairs of sentences; a prompt is a first sentence without a second one.
        kind = embed(self.type_vocab_size, name="token_type_embeddings")(jnp.zeros((1, 1), int))
        return _normalized(self.epsilon)(words + positions + kind)


class Bert(nn.Module):
    """The BERT encoder; fields are those of transformers' BertConfig."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens [B, L]; mask [B, L], True at tokens to attend to -> states [B, L, hidden_size]."""
        states = _Embeddings(
            self.vocab_size,
            self.hidden_size,
            self.max_position_embeddings,
            self.type_vocab_size,
            self.layer_norm_eps,
            name="embeddings",
        )(tokens)
        layer = functools.partial(
            BertLayer, self.num_attention_heads, self.intermediate_size, self.layer_norm_eps
        )
        return _Layers(self.num_hidden_layers, layer, name="encoder")(states, mask)


def load_minilm(
    folder: epath.Path,
    *,
    name: str,
    vocabulary: epath.Path | None = None,
    length: int = LENGTH,
) -> SentenceEncoder:
    """Loads the encoder in a folder with config.json, vocab.txt and model.safetensors.

    vocabulary: the path of vocab.txt, if it isn't in the folder. length: tokens per prompt, including the
    start and end tokens.

    Raises UserError if a file is missing, can't be read, or isn't of such a model.
    """
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: run guided-distill prepare minilm --out {folder} to make it"
        )
    network = _network(folder / "config.json")
    tokenizer = wordpiece_tokenizer(vocabulary or folder / "vocab.txt", length)
    weights = folder / "model.safetensors"
    params = bert_params(network, read_weights_file(weights), source=weights)

    def hidden(params: Mapping[str, Any], tokens: jax.Array, mask: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            states: Any = network.apply({"params": params}, tokens, mask)
        return states

    shape = (length, network.hidden_size)
    return SentenceEncoder(name, shape, tokenizer, hidden, params)


def bert_params(
    network: Bert, tensors: Mapping[str, Any], *, source: epath.Path
) -> Mapping[str, Any]:
    """The network's weights from tensors with transformers' names. Raises UserError if they don't fit.

    The pooler, a layer for classification, is left out.
    """
    example = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.bool)
    template = jax.eval_shape(network.init, jax.random.key(0), example, mask)["params"]
    named = {
        name.replace("encoder.layer.", "encoder.layers."): tensor
        for name, tensor in tensors.items()
        if not name.startswith("pooler.") and not name.endswith(".position_ids")
    }
    return to_tree(named, template, source=source)


def _network(path: epath.Path) -> Bert:
    config = read_json(path)
    for key, expected in (
        ("model_type", "bert"),
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
    ):
        if config.get(key, expected) != expected:
            raise UserError(
                f"{path} has the {key} {config[key]!r}: give a model with {expected!r}, because no other "
                f"is supported"
            )
    fields = [field for field in Bert.__dataclass_fields__ if field not in ("parent", "name")]
    if missing := [field for field in fields if field not in config]:
        raise UserError(
            f"{path} has no {', '.join(missing)}: use the config.json that comes with MiniLM"
        )
    read: dict[str, Any] = {
        field: whole_number(config[field], field, path) for field in fields[:-1]
    }
    divides(
        read["num_attention_heads"], read["hidden_size"], "num_attention_heads", "hidden_size", path
    )
    return Bert(**read, layer_norm_eps=positive(config[fields[-1]], fields[-1], path))
