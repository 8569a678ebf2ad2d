"""Tokenizers and text encoders give what transformers' give (see text_golden.py)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from random_arrays import random_pixels, random_tensors, spots
from text_cases import (
    ADDED,
    ADDED_PROMPTS,
    BERT,
    CLIP,
    LENGTH,
    PROMPTS,
    write_added_tokens,
    write_clip_tokenizer,
    write_words,
)

from guided_distill.evaluation.extractors import clip
from guided_distill.text.minilm import Bert, bert_params
from guided_distill.text.tokenizers import clip_tokenizer, wordpiece_tokenizer

GOLDENS = json.loads(Path(__file__).with_name("text_golden.json").read_text())


@pytest.mark.parametrize("pads", ["sd1", "sd2"])
def test_clip_tokens(tmp_path, pads):
    write_clip_tokenizer(tmp_path, pads)
    tokens, _ = clip_tokenizer(epath.Path(tmp_path))(PROMPTS)
    np.testing.assert_array_equal(tokens, GOLDENS["tokens"][pads])


@pytest.mark.parametrize("where", ["file", "config"])
def test_tokens_beside_the_vocabulary(tmp_path, where):
    write_clip_tokenizer(tmp_path, "sd1")
    write_added_tokens(tmp_path, where)
    tokens, _ = clip_tokenizer(epath.Path(tmp_path))(ADDED_PROMPTS)
    golden = GOLDENS["tokens"][f"added in {where}"]
    np.testing.assert_array_equal(tokens, golden)
    assert set(ADDED.values()) <= set(np.ravel(golden))


def test_bert_tokens(tmp_path):
    write_words(tmp_path / "vocab.txt")
    tokens, mask = wordpiece_tokenizer(epath.Path(tmp_path) / "vocab.txt", LENGTH)(PROMPTS)
    np.testing.assert_array_equal(tokens, GOLDENS["tokens"]["bert"])
    np.testing.assert_array_equal(mask, tokens != 0)


def test_bert_at_every_token_and_in_the_padding():
    network = Bert(**BERT)
    tokens = np.array(GOLDENS["tokens"]["bert"], np.int32)
    expected = np.array(GOLDENS["bert"])
    assert expected.std() > 0.1
    params = bert_params(network, random_tensors(bert_shapes()), source=epath.Path("random"))
    with jax.default_matmul_precision("highest"):
        states = network.apply({"params": params}, tokens, tokens != 0)
    np.testing.assert_allclose(spots(states, 64), expected, atol=2e-5)


def test_clip_vectors_of_images_and_texts():
    golden = GOLDENS["clip"]
    text = {key: each for key, each in CLIP["text_config"].items() if key != "eos_token_id"}
    network = clip.CLIP(text, CLIP["vision_config"], CLIP["projection_dim"])
    shapes = {name: tuple(shape) for name, shape in golden["shapes"].items()}
    params = clip.clip_params(network, random_tensors(shapes), source=epath.Path("random"))
    tokens = np.array(GOLDENS["tokens"]["sd1"], np.int32)
    pixels = (random_pixels(len(tokens), 16, 16, 3) / 127.5 - 1).astype(np.float32)
    end = CLIP["text_config"]["eos_token_id"]
    with jax.default_matmul_precision("highest"):
        images, texts = jax.jit(network.apply)({"params": params}, pixels, tokens, end)
    for found, name in ((images, "images"), (texts, "texts")):
        expected = np.array(golden[name])
        assert expected.std() > 0.1
        np.testing.assert_allclose(spots(found, 48), expected, atol=2e-6, err_msg=name)


def bert_shapes():
    """Names and shapes of BertModel's tensors, written out as published files have them."""
    wide, narrow = BERT["intermediate_size"], BERT["hidden_size"]
    shapes = {
        f"embeddings.{kind}_embeddings.weight": (BERT[size], narrow)
        for kind, size in (
            ("word", "vocab_size"),
            ("position", "max_position_embeddings"),
            ("token_type", "type_vocab_size"),
        )
    }
    dense = {f"attention.self.{name}": (narrow, narrow) for name in ("query", "key", "value")}
    dense["attention.output.dense"] = (narrow, narrow)
    dense |= {"intermediate.dense": (wide, narrow), "output.dense": (narrow, wide)}
    norms = ["embeddings.LayerNorm"]
    for layer in range(BERT["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
        for name, shape in dense.items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (narrow,), f"{name}.bias": (narrow,)}
    return shapes
