"""Write what transformers gives: text_golden.json, of tokenizers and of text encoders.

pip install -e .[parity]
python tests/parity/text_golden.py
"""

import json
import tempfile
from pathlib import Path

import torch
from random_arrays import random_pixels, random_tensors, spots
from text_cases import (
    ADDED_PROMPTS,
    BERT,
    CLIP,
    LENGTH,
    PADS,
    PROMPTS,
    write_added_tokens,
    write_clip_tokenizer,
    write_words,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)

WHERE = ("file", "config")
GOLDENS = Path(__file__).with_suffix(".json")


def main() -> None:
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = {pads: clip_tokens(folder / pads, pads) for pads in PADS}
        tokens["bert"] = bert_tokens(folder)
        tokens |= {f"added in {where}": added_tokens(folder / where, where) for where in WHERE}
    clip = clip_spots(tokens["sd1"])
    goldens = {"tokens": tokens, "bert": bert_spots(tokens["bert"]), "clip": clip}
    lines = [f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in goldens.items()]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def filled(tokenizer, prompts=PROMPTS) -> list[list[int]]:
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    return tokenizer(list(prompts), **options)["input_ids"]


def clip_tokens(folder: Path, pads: str) -> list[list[int]]:
    write_clip_tokenizer(folder, pads)
    return filled(CLIPTokenizer.from_pretrained(folder))


def added_tokens(folder: Path, where: str) -> list[list[int]]:
    write_clip_tokenizer(folder, "sd1")
    write_added_tokens(folder, where)
    return filled(CLIPTokenizer.from_pretrained(folder), ADDED_PROMPTS)


def bert_tokens(folder: Path) -> list[list[int]]:
    write_words(folder / "vocab.txt")
    return filled(BertTokenizer(str(folder / "vocab.txt")))


def bert_spots(tokens: list[list[int]]) -> list[float]:
    network = randomized(BertModel(BertConfig(**BERT), add_pooling_layer=False))
    numbers = torch.tensor(tokens)
    states = network(numbers, attention_mask=(numbers != 0).long()).last_hidden_state
    return rounded(spots(states, 64))


def clip_spots(tokens: list[list[int]]) -> dict[str, object]:
    """Weights' names and shapes, and the vectors of random images and of the prompts."""
    network = randomized(CLIPModel(CLIPConfig(**CLIP)))
    side = CLIP["vision_config"]["image_size"]
    pixels = torch.tensor(random_pixels(len(tokens), side, side, 3) / 127.5 - 1).float()
    out = network(input_ids=torch.tensor(tokens), pixel_values=pixels.permute(0, 3, 1, 2))
    return {
        "shapes": {name: list(each.shape) for name, each in network.state_dict().items()},
        "images": rounded(spots(out.image_embeds, 48)),
        "texts": rounded(spots(out.text_embeds, 48)),
    }


def randomized(network):
    shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    tensors = {name: torch.tensor(each) for name, each in random_tensors(shapes).items()}
    network.load_state_dict(tensors)
    return network.eval()


def rounded(values) -> list[float]:
    return [float(f"{value:.7g}") for value in values]


if __name__ == "__main__":
    main()
