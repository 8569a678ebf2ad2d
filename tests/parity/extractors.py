"""Write what torch gives: extractors.json, of the feature extractors, and two files of torch.save.

pip install -e .[parity]
python tests/parity/extractors.py
"""

import json
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import pytorch_fid.inception
import torch
from efficientnet_lite_pytorch import EfficientNet
from random_arrays import random_pixels, random_tensors, spots

from guided_distill.evaluation.extractors import inception, lite0
from guided_distill.evaluation.extractors.pretrained import tensor_shapes

GOLDENS = Path(__file__).with_suffix(".json")


def main() -> None:
    torch.set_grad_enabled(False)
    goldens = {"lite0": lite0_spots(), "inception": inception_spots(), "resized": resized_spots()}
    lines = [
        f"  {json.dumps(name)}: {json.dumps(each, default=rounded)}"
        for name, each in goldens.items()
    ]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name, is_zip in (("zip", True), ("legacy", False)):
        file = GOLDENS.with_name(f"tensors_{name}.pth")
        torch.save(some_tensors(), file, _use_new_zipfile_serialization=is_zip)


def some_tensors() -> dict[str, torch.Tensor]:
    """Of several types, a part of another and turned, a parameter, a scalar."""
    whole = torch.arange(12.0).reshape(3, 4)
    return OrderedDict(
        whole=whole,
        turned_part=whole[1:, 1:3].T,
        parameter=torch.nn.Parameter(torch.tensor([1.5, -2.0])),
        half=torch.tensor([0.5], dtype=torch.float16),
        brain=torch.tensor([3.0, 0.25], dtype=torch.bfloat16),
        double=torch.tensor([1e-300], dtype=torch.float64),
        count=torch.tensor(7),
    )


def rounded(array: np.ndarray) -> list[float]:
    return [float(f"{value:.7g}") for value in array]


def to_torch(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(pixels.astype(np.float32)).permute(0, 3, 1, 2)


def to_nhwc(x: torch.Tensor) -> np.ndarray:
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).numpy()


def resize(x: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=False)


def lite0_spots() -> dict[str, np.ndarray]:
    """The packaged weights, on images of 32 pixels."""
    weights = str(lite0.packaged_weights())
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    x = (resize(to_torch(random_pixels(3, 32, 32, 3)), 64) - 127) / 128
    features = network.extract_features(x).mean((2, 3))
    return {"features": spots(features, 64), "logits": spots(network(x), 32)}


def inception_spots() -> dict[str, np.ndarray]:
    """Random weights, on images small enough for a test: every block, the features, the logits."""
    shapes = tensor_shapes(inception.param_shapes(), inception.source)
    tensors = {name: torch.tensor(each) for name, each in random_tensors(shapes).items()}
    norms = [name.removesuffix("running_var") for name in shapes if name.endswith("running_var")]
    tensors |= {f"{name}num_batches_tracked": torch.tensor(0) for name in norms}
    download = "load_state_dict_from_url"
    with mock.patch.object(pytorch_fid.inception, download, return_value=tensors):
        network = pytorch_fid.inception.fid_inception_v3().eval()
    found: dict[str, np.ndarray] = {}

    def record(name: str, output: torch.Tensor) -> None:
        found[name] = spots(to_nhwc(output))

    for name, module in network.named_children():
        if name.startswith("Mixed"):
            module.register_forward_hook(lambda _, __, out, name=name: record(name, out))
    network.avgpool.register_forward_hook(lambda _, __, out: record("features", out[:, :, 0, 0]))
    logits = network(to_torch(random_pixels(1, 107, 107, 3)) / 127.5 - 1)
    return {**found, "logits": spots(logits - network.fc.bias)}


def resized_spots() -> dict[str, np.ndarray]:
    """Larger and smaller images at 299 pixels, as pytorch-fid resizes them."""
    return {
        str(side): spots(to_nhwc(resize(to_torch(random_pixels(1, side, side, 3)), 299)))
        for side in (32, 400)
    }


if __name__ == "__main__":
    main()
