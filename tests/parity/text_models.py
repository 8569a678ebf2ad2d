"""Small networks with random weights, in the files of published ones."""

import json

import jax
import numpy as np
import safetensors.numpy
from random_arrays import random_tensors
from text_cases import BERT, CLIP, LENGTH, write_clip_tokenizer, write_words

from guided_distill.evaluation.extractors import clip
from guided_distill.formats.torch_layout import to_tensors, to_tree
from guided_distill.models.stable_diffusion.text_encoder import CLIPTextEncoder
from guided_distill.text.minilm import Bert


def random_params(network, *inputs):
    """Weights of a network that takes inputs of these shapes."""
    template = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), template)
    shapes = {name: each.shape for name, each in to_tensors(zeros).items()}
    return to_tree(random_tensors(shapes), template, source="random")


def write_clip(folder, pads="sd1", **changes):
    """Random text encoder and its tokenizer, as diffusers has them."""
    write_clip_tokenizer(folder / "tokenizer", pads)
    (folder / "text_encoder").mkdir()
    sizes = {
        "vocab_size": 524,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        **changes,
    }
    config = {"model_type": "clip_text_model", "hidden_act": "gelu", **sizes}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    network = CLIPTextEncoder(hidden_act="gelu", **sizes)
    params = random_params(network, jax.ShapeDtypeStruct((1, 2), np.int32))
    tensors = to_tensors(params)
    safetensors.numpy.save_file(tensors, folder / "text_encoder" / "model.safetensors")
    return network, params


def write_minilm(folder, **changes):
    """A small model with random weights, in a published one's files."""
    sizes = {**BERT, **changes}
    folder.mkdir(parents=True)
    write_words(folder / "vocab.txt")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    network = Bert(**sizes)
    tokens, mask = (jax.ShapeDtypeStruct((1, 2), dtype) for dtype in (np.int32, bool))
    params = random_params(network, tokens, mask)
    tensors = {
        name.replace("layers", "layer"): tensor for name, tensor in to_tensors(params).items()
    }
    tensors |= {"pooler.dense.weight": np.zeros((sizes["hidden_size"],) * 2, np.float32)}
    tensors |= {"embeddings.position_ids": np.arange(40)[None]}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def write_clip_of_both(folder):
    """A small CLIP of images and texts with random weights, as transformers saves one."""
    write_clip_tokenizer(folder, "sd1")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **CLIP}))
    text = {key: each for key, each in CLIP["text_config"].items() if key != "eos_token_id"}
    network = clip.CLIP(text, CLIP["vision_config"], CLIP["projection_dim"])
    shapes = ((1, 16, 16, 3), np.float32), ((1, 2), int), ((), int)
    params = random_params(network, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    tensors = to_tensors(params)
    token = "vision_model.embeddings.class_embedding"
    tensors[token] = tensors.pop(f"{token}.bias")
    tensors |= {
        "logit_scale": np.array(2, np.float32),
        "text_model.embeddings.position_ids": np.arange(3),
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
