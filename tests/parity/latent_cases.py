"""What both sides of the latent networks' parity tests share: sizes, inputs and weights."""

import math
from pathlib import Path

import numpy as np
from unet_cases import normal

GOLDEN = Path(__file__).parent / "latent_golden.npz"
GROUPS = 8
CHANNELS = (32, 64)
CONTEXT = 24
CLASSES = 5
W_WIDTH = 16

UNETS = {
    "sd1": {"cross_attention_levels": (0,), "num_attention_heads": (4, 4), "w_conditioned": True},
    "sd2": {
        "cross_attention_levels": (0,),
        "num_attention_heads": (2, 4),
        "use_linear_projection": True,
    },
    "inpaint": {"cross_attention_levels": (0,), "num_attention_heads": (4, 4)},
    "imagenet": {
        "cross_attention_levels": (1,),
        "num_attention_heads": (1, 1),
        "num_classes": CLASSES,
    },
}
"""By name, what is particular to each U-Net. All but "imagenet" take texts."""

DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}
CLIP = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
ACTIVATIONS = ("quick_gelu", "gelu")
CODES = 16

Z = normal("z", 2, 7, 9, 4)
"""Sides that are odd, as those of latents of an image of 56 x 72 pixels."""
EVEN_Z = normal("even z", 2, 8, 8, 4)
TIME = np.array([3.0, 870.0], np.float32)
W = np.array([0.5, 6.0], np.float32)
TEXT = normal("text", 2, 7, CONTEXT)
LABEL = np.array([1, CLASSES])
INPAINT = normal("inpaint", 2, 7, 9, 5)
IMAGE = normal("image", 2, 16, 16, 3)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 10))
STRONG = ("to_q", "to_k", "q_proj", "k_proj", "proj", "fc1", "net_2", "linear")
"""Layers before something that isn't linear, and those that weigh the branch after it."""


def weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of that path in our tree.

    Activations are small, so that an epsilon counts, but attention and perceptrons far from linear.
    """
    *_, layer, leaf = path.split("/")
    values = normal(path, *shape)
    match leaf:
        case "scale":
            return 1.0 + 0.2 * values
        case "bias":
            return 0.02 * values
        case "embedding":
            return 0.2 * values
    gain = 1.5 if layer in STRONG else 0.1 if layer == "proj_in" else 0.3
    return values * np.float32(gain / math.sqrt(math.prod(shape[:-1])))


def probe(output: np.ndarray) -> np.ndarray:
    """256 values of an output at fixed places, or all."""
    return np.random.default_rng(0).permutation(np.ravel(output))[:256].astype(np.float32)
