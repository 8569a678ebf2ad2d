"""Write unet_golden.npz: the U-Net's blocks, and a whole small one, built from diffusers' parts.

pip install -e '.[parity]' && python tests/parity/unet_golden.py
"""

import numpy as np
import torch
import unet_cases as cases
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

TIME_SCALE, W_SCALE = 1000.0, 1000.0 / 16.0


class SinusoidMLP(nn.Module):
    """A number [B] to its embedding."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.sinusoid = Timesteps(
            cases.WIDTH, flip_sin_to_cos=False, downscale_freq_shift=1, scale=scale
        )
        self.mlp = TimestepEmbedding(cases.WIDTH, cases.EMBEDDING)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.sinusoid(value))


class LabelAndW(nn.Module):
    """In the place of diffusers' embedding of a label: the sum of a label's and of w's."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(cases.CLASSES + 1, cases.EMBEDDING)
        self.w = SinusoidMLP(W_SCALE)

    def forward(self, label_and_w: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        label, w = label_and_w
        return self.label(label) + self.w(w)


def set_weights(module: nn.Module, name: str) -> None:
    """Give a layer the weights of that name, from our layout to torch's."""
    out, *rest = module.weight.shape
    match module:
        case nn.GroupNorm():
            weight = cases.weight(f"{name}/scale", out)
        case nn.Embedding():
            weight = cases.weight(f"{name}/embedding", out, *rest)
        case nn.Conv2d(kernel_size=(3, 3)):
            weight = cases.weight(f"{name}/kernel", 3, 3, rest[0], out).transpose(3, 2, 0, 1)
        case nn.Linear() | nn.Conv2d(kernel_size=(1, 1)):
            weight = cases.weight(f"{name}/kernel", rest[0], out).T.reshape(module.weight.shape)
    _set(module.weight, weight)
    if getattr(module, "bias", None) is not None:
        _set(module.bias, cases.weight(f"{name}/bias", out))


def _set(parameter: nn.Parameter, value: np.ndarray) -> None:
    parameter.data = torch.from_numpy(np.ascontiguousarray(value)).reshape(parameter.shape)


def set_residual(block: ResnetBlock2D, name: str) -> None:
    """Name the layers of a residual block."""
    set_weights(block.norm1, f"{name}/norm_1")
    set_weights(block.conv1, f"{name}/conv_1")
    set_weights(block.time_emb_proj, f"{name}/modulation")
    set_weights(block.norm2, f"{name}/norm_2")
    set_weights(block.conv2, f"{name}/conv_2")
    if block.conv_shortcut is not None:
        set_weights(block.conv_shortcut, f"{name}/skip")


def set_attention(block: Attention, name: str) -> None:
    """Name the layers of an attention block; ours has queries, keys and values in one weight."""
    channels = block.to_q.in_features
    heads = (block.heads, channels // block.heads)
    set_weights(block.group_norm, f"{name}/norm")
    kernel = cases.weight(f"{name}/qkv/kernel", channels, 3, *heads)
    bias = cases.weight(f"{name}/qkv/bias", 3, *heads)
    for index, layer in enumerate((block.to_q, block.to_k, block.to_v)):
        _set(layer.weight, kernel[:, index].reshape(channels, channels).T)
        _set(layer.bias, bias[index])
    output = cases.weight(f"{name}/output/kernel", *heads, channels)
    _set(block.to_out[0].weight, output.reshape(channels, channels).T)
    _set(block.to_out[0].bias, cases.weight(f"{name}/output/bias", channels))


def set_mlp(mlp: TimestepEmbedding, name: str) -> None:
    """Name the layers of an embedding of a number."""
    set_weights(mlp.linear_1, f"{name}/hidden")
    set_weights(mlp.linear_2, f"{name}/output")


def set_label_and_w(module: LabelAndW, name: str) -> None:
    """Name the layers of the rest of the conditioning."""
    set_weights(module.label, f"{name}/label")
    set_mlp(module.w.mlp, f"{name}/w")


def images(array: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def residual(name: str) -> torch.Tensor:
    """The output of a residual block."""
    channels, resampling = cases.RESIDUAL_BLOCKS[name]
    block = ResnetBlock2D(
        in_channels=cases.WIDTH,
        out_channels=channels,
        temb_channels=cases.EMBEDDING,
        groups=cases.GROUPS,
        eps=1e-6,
        time_embedding_norm="scale_shift",
        skip_time_act=True,  # In ours, the network does it, once for all blocks.
        down=resampling == "down",
        up=resampling == "up",
    )
    set_residual(block, name)
    return block(images(cases.FEATURES), torch.from_numpy(cases.CONDITION)).permute(0, 2, 3, 1)


def attention() -> torch.Tensor:
    """The output of an attention block with two heads."""
    block = Attention(
        cases.WIDTH,
        heads=cases.WIDTH // cases.HEAD_WIDTH,
        dim_head=cases.HEAD_WIDTH,
        norm_num_groups=cases.GROUPS,
        eps=1e-6,
        bias=True,
        residual_connection=True,
    )
    set_attention(block, "attention")
    return block(images(cases.FEATURES)).permute(0, 2, 3, 1)


def conditioning() -> torch.Tensor:
    """The sum of the three embeddings."""
    time, label_and_w = SinusoidMLP(TIME_SCALE), LabelAndW()
    set_mlp(time.mlp, "conditioning/time")
    set_label_and_w(label_and_w, "conditioning")
    others = label_and_w((torch.from_numpy(cases.LABEL), torch.from_numpy(cases.W)))
    return time(torch.from_numpy(cases.TIME)) + others


def whole_net() -> torch.Tensor:
    """The output of a net of two levels, with attention at the second."""
    net = UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(cases.WIDTH, 2 * cases.WIDTH),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=cases.HEAD_WIDTH,
        norm_num_groups=cases.GROUPS,
        attn_norm_num_groups=cases.GROUPS,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=cases.CLASSES + 1,
    )
    net.class_embedding = LabelAndW()
    set_weights(net.conv_in, "net/input")
    set_mlp(net.time_embedding, "net/conditioning/time")
    set_label_and_w(net.class_embedding, "net/conditioning")
    for level, block in enumerate(net.down_blocks):
        _set_level(block, f"net/down_{level}", block.downsamplers)
    set_residual(net.mid_block.resnets[0], "net/middle_0")
    set_attention(net.mid_block.attentions[0], "net/middle_attention")
    set_residual(net.mid_block.resnets[1], "net/middle_1")
    for level, block in enumerate(reversed(net.up_blocks)):
        _set_level(block, f"net/up_{level}", block.upsamplers)
    set_weights(net.conv_norm_out, "net/output_norm")
    set_weights(net.conv_out, "net/output")
    output = net(
        images(cases.IMAGE),
        torch.from_numpy(TIME_SCALE * cases.TIME),
        class_labels=(torch.from_numpy(cases.LABEL), torch.from_numpy(cases.W)),
    )
    return output.sample.permute(0, 2, 3, 1)


def _set_level(level: nn.Module, name: str, resamplers: nn.ModuleList | None) -> None:
    for index, block in enumerate(level.resnets):
        set_residual(block, f"{name}_{index}")
    for index, block in enumerate(getattr(level, "attentions", ())):
        set_attention(block, f"{name}_{index}_attention")
    for block in resamplers or ():
        set_residual(block, name)


def main() -> None:
    """Compute every case and store its probe."""
    with torch.no_grad():
        outputs = {name: residual(name) for name in cases.RESIDUAL_BLOCKS}
        outputs |= {
            "attention": attention(),
            "conditioning": conditioning(),
            "net": whole_net(),
        }
    np.savez(cases.GOLDEN, **{name: cases.probe(out.numpy()) for name, out in outputs.items()})


if __name__ == "__main__":
    main()
