"""The small vocabularies, prompts and sizes that tests and transformers are compared on."""

import json
from pathlib import Path

PROMPTS = (
    "A red apple, it's 12 o'clock!!",
    "  two\tspaces\n and  CAPITALS ",
    "Café naïve Ünïcode 日本 🎉",
    "",
    "the <|endoftext|> mark [SEP] of [MASK] another kind",
    "there is much more to be told than the few tokens that an encoder takes are able to tell",
)
LENGTH = 24

MERGES = (
    "t h",
    "th e</w>",
    "r e",
    "a p",
    "ap p",
    "l e</w>",
    "app le</w>",
    "re d</w>",
    "i n",
    "o n",
)

PADS = {
    "sd1": {"pad_token": "<|endoftext|>"},
    "sd2": {"pad_token": {"content": "!", "lstrip": False, "normalized": False}},
}

ADDED = {"<sks>": 524, "<Two Words>": 525, "tok-en": 526}
"""Words beside the vocabulary, as textual inversion adds them, and their numbers."""

ADDED_PROMPTS = (
    "a <sks> apple",
    "<sks>the<sks>",
    "<Two Words>,tok-en",
    "TOK-EN <SKS>",
    "<two words>",
)


WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *"abcdefghijklmnopqrstuvwxyz0123456789!,.'",
    *(f"##{each}" for each in "abcdefghijklmnopqrstuvwxyz0123456789"),
    *("the", "red", "apple", "##ing", "two", "naive", "cafe", "日"),
)

BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}

CLIP = {
    "text_config": {
        "vocab_size": 524,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": LENGTH,
        "hidden_act": "gelu",
        "eos_token_id": 523,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "hidden_act": "quick_gelu",
    },
    "projection_dim": 20,
}


def byte_letters() -> list[str]:
    """The letters that stand for bytes 0 to 255 in byte-level vocabularies (Radford et al. 2019)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


def write_clip_tokenizer(folder: Path, pads: str) -> None:
    """A tokenizer as the folders of Stable Diffusion 1 or 2 hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(byte_letters())
    words = [*letters, *(f"{each}</w>" for each in letters)]
    words += [merge.replace(" ", "") for merge in MERGES]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    config = {**marks, "pad_token": "<|endoftext|>", "model_max_length": LENGTH}
    config["tokenizer_class"] = "CLIPTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {**marks, **PADS[pads], "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def write_added_tokens(folder: Path, where: str) -> None:
    """More tokens for a tokenizer in the folder: in `added_tokens.json`, or in the config as of 2023."""
    if where == "file":
        (folder / "added_tokens.json").write_text(json.dumps(ADDED))
        return
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    how = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config["added_tokens_decoder"] = {
        **{
            str(number): {"content": mark, **how, "special": True}
            for number, mark in ((522, "<|startoftext|>"), (523, "<|endoftext|>"))
        },
        **{
            str(number): {"content": word, **how, "special": False, "normalized": word != "tok-en"}
            for word, number in ADDED.items()
        },
    }
    path.write_text(json.dumps(config))


def write_words(file: Path) -> None:
    """A vocab.txt."""
    file.write_text("\n".join(WORDS) + "\n")
