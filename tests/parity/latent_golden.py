"""Write latent_golden.npz: outputs of diffusers' and transformers' networks, small ones.

pip install -e '.[parity]' && python tests/parity/latent_golden.py
"""

import latent_cases as cases
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel


def our_path(name: str) -> str:
    """down_blocks.0.resnets.1.conv1 -> down_blocks_0/resnets_1/conv1."""
    path: list[str] = []
    for part in name.split("."):
        if part.isdigit():
            path[-1] += f"_{part}"
        else:
            path.append(part)
    return "/".join(path)


def set_weights(model: nn.Module) -> nn.Module:
    """Give every layer the weights of its name, from our layout to torch's."""
    for name, layer in model.named_modules():
        path = our_path(name)
        weight = getattr(layer, "weight", None)
        if weight is None:
            continue
        match layer:
            case nn.Conv2d():
                out, into, *sides = weight.shape
                values = cases.weight(f"{path}/kernel", (*sides, into, out)).transpose(3, 2, 0, 1)
            case nn.Linear():
                values = cases.weight(f"{path}/kernel", tuple(weight.shape[::-1])).T
            case nn.Embedding():
                values = cases.weight(f"{path}/embedding", tuple(weight.shape))
            case nn.GroupNorm() | nn.LayerNorm():
                values = cases.weight(f"{path}/scale", tuple(weight.shape))
            case _:
                raise TypeError(f"{name} is a {type(layer)}")
        weight.data = torch.from_numpy(np.ascontiguousarray(values))
        if getattr(layer, "bias", None) is not None:
            bias = cases.weight(f"{path}/bias", tuple(layer.bias.shape))
            layer.bias.data = torch.from_numpy(bias)
    return model.eval()


def images(array: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def unet(name: str) -> torch.Tensor:
    """The output of a U-Net."""
    case = cases.UNETS[name]
    attends = [level in case["cross_attention_levels"] for level in range(len(cases.CHANNELS))]
    labelled = "num_classes" in case
    z = cases.EVEN_Z[..., :3] if labelled else cases.Z
    net = UNet2DConditionModel(
        in_channels=9 if name == "inpaint" else z.shape[-1],
        out_channels=z.shape[-1],
        block_out_channels=cases.CHANNELS,
        down_block_types=["CrossAttnDownBlock2D" if it else "DownBlock2D" for it in attends],
        up_block_types=["CrossAttnUpBlock2D" if it else "UpBlock2D" for it in attends[::-1]],
        layers_per_block=1,
        norm_num_groups=cases.GROUPS,
        cross_attention_dim=cases.CONTEXT,
        attention_head_dim=case["num_attention_heads"],
        use_linear_projection=case.get("use_linear_projection", False),
        time_cond_proj_dim=cases.W_WIDTH if case.get("w_conditioned") else None,
    )
    set_weights(net)
    context = torch.from_numpy(cases.TEXT)
    if labelled:
        table = cases.weight("class_embedder/embedding", (cases.CLASSES + 1, cases.CONTEXT))
        context = torch.from_numpy(table[cases.LABEL][:, None, :])
    if name == "inpaint":
        z = np.concatenate([z, cases.INPAINT], axis=-1)
    output = net(
        images(z),
        torch.from_numpy(cases.TIME),
        encoder_hidden_states=context,
        timestep_cond=w_embedding() if case.get("w_conditioned") else None,
    )
    return output.sample.permute(0, 2, 3, 1)


def w_embedding() -> torch.Tensor:
    """What the pipelines make of guidance_scale = 1 + w."""
    scale = torch.from_numpy(1.0 + cases.W)
    return StableDiffusionPipeline.get_guidance_scale_embedding(None, scale - 1, cases.W_WIDTH)


def dit() -> torch.Tensor:
    """The eps half of the output of a DiT."""
    net = DiTTransformer2DModel(
        **cases.DIT,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        num_embeds_ada_norm=cases.CLASSES,
    )
    set_weights(net)
    time, label = torch.from_numpy(cases.TIME), torch.from_numpy(cases.LABEL)
    return net(images(cases.EVEN_Z), time, label).sample.permute(0, 2, 3, 1)[..., :4]


def autoencoder_kl() -> dict[str, torch.Tensor]:
    """What an AutoencoderKL makes of images, and of latents."""
    net = AutoencoderKL(
        block_out_channels=cases.CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=cases.GROUPS,
    )
    set_weights(net)
    latents = net.encode(images(cases.IMAGE)).latent_dist
    decoded = net.decode(images(cases.EVEN_Z)).sample
    return {
        "kl mean": latents.mean.permute(0, 2, 3, 1),
        "kl log variance": latents.logvar.permute(0, 2, 3, 1),
        "kl decoded": decoded.permute(0, 2, 3, 1),
    }


def vq_model() -> dict[str, torch.Tensor]:
    """What a VQModel makes of images, and of latents."""
    net = VQModel(
        block_out_channels=cases.CHANNELS,
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        norm_num_groups=cases.GROUPS,
        num_vq_embeddings=cases.CODES,
    )
    set_weights(net)
    decoded = net.decode(images(cases.EVEN_Z[..., :3])).sample
    return {
        "vq encoded": net.encode(images(cases.IMAGE)).latents.permute(0, 2, 3, 1),
        "vq decoded": decoded.permute(0, 2, 3, 1),
    }


def clip(activation: str) -> torch.Tensor:
    """The last hidden state of a text encoder."""
    net = CLIPTextModel(CLIPTextConfig(**cases.CLIP, hidden_act=activation))
    set_weights(net)
    return net(torch.from_numpy(cases.TOKENS)).last_hidden_state


def main() -> None:
    """Compute every case and store its probe."""
    with torch.no_grad():
        outputs = {name: unet(name) for name in cases.UNETS}
        outputs |= {activation: clip(activation) for activation in cases.ACTIVATIONS}
        outputs |= {"dit": dit(), **autoencoder_kl(), **vq_model()}
    np.savez(cases.GOLDEN, **{name: cases.probe(out.numpy()) for name, out in outputs.items()})


if __name__ == "__main__":
    main()
