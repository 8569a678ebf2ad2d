"""Print how far Stable Diffusion 1's U-Net, 860 million random weights, is from diffusers'.

pip install -e '.[parity]' && python tests/parity/full_size.py
"""

import latent_cases as cases
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from latent_golden import images, set_weights
from test_latent_parity import run, weights
from unet_cases import normal

from guided_distill.models.stable_diffusion.unet import UNet2DCondition

Z = normal("full z", 1, 64, 64, 4)
TEXT = normal("full text", 1, 77, 768)
TIME = cases.TIME[-1:]


def torch_output() -> np.ndarray:
    """What diffusers' network answers, [1, 64, 64, 4]."""
    with torch.no_grad():
        net = set_weights(UNet2DConditionModel(cross_attention_dim=768))
        output = net(images(Z), torch.from_numpy(TIME), torch.from_numpy(TEXT)).sample
    return output.permute(0, 2, 3, 1).numpy()


def our_output() -> np.ndarray:
    """What ours answers."""
    net, inputs = UNet2DCondition(), (Z, TIME, {"text": TEXT})
    return np.asarray(run(net, weights(net, *inputs), *inputs))


def main() -> None:
    """Print the largest difference, over the output's standard deviation."""
    expected = torch_output()
    print(np.abs(our_output() - expected).max() / expected.std())


if __name__ == "__main__":
    main()
