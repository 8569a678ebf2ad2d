import dataclasses
import json
import sys

import numpy as np
import pytest
from etils import epath
from text_cases import BERT, LENGTH, WORDS, write_clip_tokenizer, write_words
from text_models import write_clip, write_minilm

from guided_distill.errors import UserError
from guided_distill.text import minilm
from guided_distill.text.registry import load_text_encoder
from guided_distill.text.tokenizers import clip_tokenizer, wordpiece_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "minilm"
    write_minilm(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(f"minilm:{folder}")


def test_padding_has_no_effect(encoder, folder):
    prompts = ["red apple", "two apples, 2 red", ""]
    states = encoder.encode(prompts)
    assert states.shape == (3, *encoder.shape) == (3, minilm.LENGTH, 24)
    assert states.dtype == np.float32
    shorter = minilm.load_minilm(epath.Path(folder), name="shorter", length=14).encode(prompts)
    np.testing.assert_allclose(states[:, :14], shorter, atol=1e-5)
    assert np.abs(states[0] - states[1]).max() > 0.1


def test_prompts_are_encoded_independently(encoder):
    prompts = [f"the {number}th apple" for number in range(33)]
    together = encoder.encode(prompts)
    assert len(together) == 33
    np.testing.assert_allclose(together[32:], encoder.encode(prompts[32:]), atol=1e-5)
    assert encoder.encode([]).shape == (0, *encoder.shape)


def test_a_few_prompts_take_a_small_batch(encoder):
    sizes = []

    def hidden(params, tokens, mask):
        sizes.append(len(tokens))
        return encoder.hidden(params, tokens, mask)

    counted = dataclasses.replace(encoder, hidden=hidden)
    for count in (1, 2, 3, 4, 33):
        np.testing.assert_allclose(
            counted.encode(["the"] * count)[-1], encoder.encode(["the"])[0], atol=1e-5
        )
    # Each size is traced once: 33 prompts are batches of 32 and one.
    assert sizes == [1, 2, 4, 32]


def test_a_sentence_is_the_mean_of_its_tokens(encoder):
    prompts = ["red apple", "the"]
    found = encoder.embed(prompts)
    for vector, states, count in zip(found, encoder.encode(prompts), (4, 3), strict=True):
        mean = states[:count].mean(0)
        np.testing.assert_allclose(vector, mean / np.sqrt((mean**2).sum()), atol=1e-6)
    assert encoder.embed([]).shape == (0, 24)


def test_a_long_prompt_is_truncated_with_a_warning_that_quotes_the_rest(tmp_path, caplog):
    write_words(tmp_path / "vocab.txt")
    tokenizer = wordpiece_tokenizer(epath.Path(tmp_path) / "vocab.txt", 5)
    tokens, mask = tokenizer(["The RED apple, and  More", "the"])
    assert caplog.messages == [
        "a prompt has 11 tokens, but the text encoder takes 3, so the rest is ignored: ', and  More'"
    ]
    words = [WORDS[number] for number in tokens.ravel()]
    assert words == ["[CLS]", "the", "red", "apple", "[SEP]", "[CLS]", "the", "[SEP]"] + 2 * [
        "[PAD]"
    ]
    np.testing.assert_array_equal(mask, [[True] * 5, [True] * 3 + [False] * 2])


def test_clip_from_a_diffusers_folder(tmp_path):
    network, params = write_clip(tmp_path, "sd2")
    encoder = load_text_encoder(f"clip:{tmp_path}")
    prompts = ["a red apple", ""]
    tokens, _ = clip_tokenizer(epath.Path(tmp_path) / "tokenizer")(prompts)
    assert (tokens[:, -1] == 0).all()
    expected = network.apply({"params": params}, tokens)
    assert encoder.shape == (LENGTH, 16)
    np.testing.assert_allclose(encoder.encode(prompts), expected, atol=1e-5)


def test_clip_parts_of_different_models_are_refused(tmp_path):
    write_clip(tmp_path, max_position_embeddings=LENGTH - 1)
    with pytest.raises(UserError, match=r"length of 24.*takes 524 and 23.*from the same model"):
        load_text_encoder(f"clip:{tmp_path}")


@pytest.mark.parametrize("name", ["minilm", "minilm:", "t5:x", ""])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(UserError, match=r"minilm:DIR, clip:DIR"):
        load_text_encoder(name)


def test_missing_folders_say_how_to_make_them(tmp_path):
    with pytest.raises(UserError, match=r"guided-distill prepare minilm --out .*nowhere"):
        load_text_encoder(f"minilm:{tmp_path}/nowhere")
    with pytest.raises(UserError, match=r"no folder text_encoder"):
        load_text_encoder(f"clip:{tmp_path}")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.txt", "a\nb\n", r"vocab\.txt has no token \[CLS\]"),
        (
            "config.json",
            '{"model_type": "roberta"}',
            r"model_type 'roberta': give a model with 'bert'",
        ),
        ("config.json", json.dumps({**BERT, "hidden_size": "24"}), "hidden_size is '24'"),
        (
            "config.json",
            json.dumps({**BERT, "num_attention_heads": 5}),
            "doesn't divide hidden_size",
        ),
        ("config.json", json.dumps({**BERT, "layer_norm_eps": None}), "layer_norm_eps is None"),
        ("config.json", "{}", r"has no vocab_size.*config\.json that comes with MiniLM"),
        ("config.json", json.dumps({**BERT, "num_hidden_layers": 3}), r"lacks encoder\.layer"),
        ("model.safetensors", "x", r"can't be read as safetensors"),
    ],
)
def test_damaged_files_of_minilm_are_named(tmp_path, file, content, message):
    folder = tmp_path / "model"
    write_minilm(folder)
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load_text_encoder(f"minilm:{folder}")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("merges.txt", "q q\n", r"vocab\.json and merges\.txt don't fit"),
        ("vocab.json", "[", r"vocab\.json is not JSON"),
        ("vocab.json", '{"a": 0}', r"no token <\|startoftext\|>|don't fit"),
        ("tokenizer_config.json", "{}", r"model_max_length None: set it"),
        ("special_tokens_map.json", '{"pad_token": "?!"}', r"no token \?!"),
        (
            "special_tokens_map.json",
            '{"pad_token": null}',
            "pad_token is None, but must be a string",
        ),
        ("special_tokens_map.json", '{"pad_token": {"x": 1}}', "pad_token is None"),
        ("special_tokens_map.json", '{"bos_token": [1]}', r"bos_token is \[1\]"),
        ("special_tokens_map.json", "[]", "should hold an object"),
        ("added_tokens.json", '{"<sks>": "x"}', "an added token the id 'x'"),
        ("added_tokens.json", '{"<sks>": 900}', r"<sks> has the id 900.*gives it 524"),
        (
            "tokenizer_config.json",
            '{"model_max_length": 24, "added_tokens_decoder": ["<sks>"]}',
            "must be an object with one object per id",
        ),
        (
            "tokenizer_config.json",
            '{"model_max_length": 24, "added_tokens_decoder": {"524": "<sks>"}}',
            "must be an object with one object per id",
        ),
        (
            "tokenizer_config.json",
            '{"model_max_length": 24, "added_tokens_decoder": {"524": {"content": "a", "special": 1}}}',
            "must have true or false for special",
        ),
    ],
)
def test_damaged_files_of_a_clip_tokenizer_are_named(tmp_path, file, content, message):
    write_clip_tokenizer(tmp_path, "sd1")
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        clip_tokenizer(epath.Path(tmp_path))


def test_a_missing_file_of_a_tokenizer_is_named(tmp_path):
    write_clip_tokenizer(tmp_path, "sd1")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt is missing"):
        clip_tokenizer(epath.Path(tmp_path))


def test_a_tokenizer_in_one_file_is_the_same(tmp_path):
    write_clip_tokenizer(tmp_path, "sd2")
    apart = clip_tokenizer(epath.Path(tmp_path))
    apart.vocabulary.save(str(tmp_path / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    together = clip_tokenizer(epath.Path(tmp_path))
    for one, other in zip(apart(["A red  apple!"]), together(["A red  apple!"]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_extra_is_named_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install tokenizers \(the extra `text`\)"):
        wordpiece_tokenizer(epath.Path(tmp_path / "vocab.txt"), LENGTH)
