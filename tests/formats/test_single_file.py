"""Single files in CompVis' layout, made from small models by the names that diffusers reads."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath

from guided_distill import cli
from guided_distill.errors import UserError
from guided_distill.formats.diffusers_autoencoder import read_autoencoder
from guided_distill.formats.diffusers_configs import read_denoiser
from guided_distill.formats.single_file import read_single_file, write_folder
from guided_distill.formats.torch_layout import canonical, to_tensors, to_tree
from guided_distill.runs.trained import load_finished
from guided_distill.text.clip import read_text_encoder

NAMES = json.loads((Path(__file__).parents[1] / "parity" / "compvis_names.json").read_text())


def renamed(tensors, network, prefix):
    """In CompVis' names; the small networks have the golden ones' structure, or a part of it."""
    names = {theirs.removeprefix("text_model."): name for name, theirs in NAMES[network].items()}
    made = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        made[f"{prefix}{names[layer]}.{leaf}"] = tensor
    return made


def unet_file(**options):
    return renamed(to_tensors(tiny.unet(**options)), "two_levels", "model.diffusion_model.")


def vae_file(tree):
    tensors = to_tensors(tree)
    codes = {name: tensors.pop(name) for name in list(tensors) if name.startswith("quantize")}
    made = renamed(tensors, "vae", "first_stage_model.")
    for name, tensor in made.items():
        if "attn_1" in name and tensor.ndim == 2:
            made[name] = tensor[..., None, None]
    return made | {f"first_stage_model.{name}": tensor for name, tensor in codes.items()}


TEXT_1, TEXT_2 = (to_tensors(tiny.text_encoder(layers)) for layers in (12, 24))
READ_2 = {name: each for name, each in TEXT_2.items() if "layers.23." not in name}
"""What diffusers reads of Stable Diffusion 2's: it ignores the block `resblocks.23`."""


def clip_file(tensors=TEXT_1, prefix="text_model."):
    prefix = f"cond_stage_model.transformer.{prefix}"
    made = {f"{prefix}{name}": each for name, each in tensors.items()}
    return {**made, f"{prefix}embeddings.position_ids": np.arange(tiny.LENGTH)[None]}


def open_clip_file(blocks):
    """With CLIP's other parts."""
    prefix = "cond_stage_model.model."
    tensors = dict(TEXT_2)
    made = {f"{prefix}positional_embedding": tensors.pop("embeddings.position_embedding.weight")}
    made[f"{prefix}token_embedding.weight"] = tensors.pop("embeddings.token_embedding.weight")
    for layer in range(24):
        for leaf in ("weight", "bias"):
            parts = [
                tensors.pop(f"encoder.layers.{layer}.self_attn.{each}_proj.{leaf}")
                for each in "qkv"
            ]
            block = f"{prefix}transformer.resblocks.{layer}"
            made[f"{block}.attn.in_proj_{leaf}"] = np.concatenate(parts)
    names = {
        theirs.removeprefix("text_model."): name for name, theirs in NAMES["open_clip"].items()
    }
    for name, tensor in tensors.items():
        number = re.search(r"layers\.(\d+)\.|$", name)[1]
        layer, _, leaf = name.replace(f"layers.{number}.", "layers.1.").rpartition(".")
        layer = names[layer].replace("resblocks.1.", f"resblocks.{number}.")
        made[f"{prefix}{layer}.{leaf}"] = tensor
    unread = tuple(f"{prefix}transformer.resblocks.{number}." for number in range(blocks, 24))
    return {
        **{name: each for name, each in made.items() if not name.startswith(unread)},
        f"{prefix}logit_scale": np.ones(()),
        f"{prefix}text_projection": np.ones((2, 2)),
    }


def scaled_linear(start, end):
    return (np.linspace(start**0.5, end**0.5, 1000) ** 2).astype(np.float32)


OTHERS = {
    "model_ema.decay": np.ones(()),
    "model_ema.diffusion_modelout2weight": np.ones(3),
    "alphas_cumprod": np.cumprod(1 - scaled_linear(0.00085, 0.012)),
    "scale_factor": np.array(0.18215, np.float16),
    "logvar": np.zeros(1000),
    "first_stage_model.loss.logvar": np.zeros(()),
}
SD1 = {**unet_file(), **vae_file(tiny.vae()), **clip_file(), **OTHERS}
UNET_2 = unet_file(linear=True)
SD2 = {**UNET_2, **vae_file(tiny.vae()), **open_clip_file(24)}
CLASSES = {
    **unet_file(),
    **vae_file(tiny.vq()),
    "cond_stage_model.embedding.weight": np.ones((4, tiny.WIDTH), np.float32),
}


def read(tmp_path, tensors, prediction_type=None, metadata=None, **how):
    path = epath.Path(tmp_path) / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata)
    return read_single_file(path, prediction_type=prediction_type, **how)


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor)


def test_stable_diffusion_1(tmp_path):
    found = read(tmp_path, {**SD1, "betas": scaled_linear(0.00085, 0.012)})
    assert_same(found.unet.tensors, to_tensors(tiny.unet()))
    assert_same(found.vae.tensors, to_tensors(tiny.vae()))
    assert_same(canonical(found.text_encoder.tensors), TEXT_1)
    assert found.class_embedder is None
    expected = read_denoiser({**tiny.UNET, "sample_size": 64}, "F")
    assert read_denoiser(found.unet.config, "F") == expected
    assert {key: found.vae.config[key] for key in tiny.VAE} == tiny.VAE
    expected = {**tiny.TEXT, "num_hidden_layers": 12}
    assert {key: found.text_encoder.config[key] for key in tiny.TEXT} == expected
    assert found.scheduler["prediction_type"] == "epsilon"


def test_text_names_of_transformers_5(tmp_path):
    """Its CLIPTextModel has no `text_model` inside."""
    tensors = {name: each for name, each in SD1.items() if "text_model" not in name}
    found = read(tmp_path, {**tensors, **clip_file(prefix="")})
    assert_same(canonical(found.text_encoder.tensors), TEXT_1)


@pytest.mark.parametrize(
    "text",
    [
        open_clip_file(24),
        open_clip_file(23),
        clip_file(TEXT_2),
        clip_file(READ_2),
        clip_file(READ_2, prefix=""),
    ],
    ids=["whole", "without the last block", "renamed", "renamed, 23 blocks", "transformers 5"],
)
def test_stable_diffusion_2(tmp_path, text):
    found = read(tmp_path, {**UNET_2, **vae_file(tiny.vae()), **text}, "v_prediction")
    assert_same(found.unet.tensors, to_tensors(tiny.unet(linear=True)))
    assert_same(canonical(found.text_encoder.tensors), READ_2)
    assert found.text_encoder.config["hidden_act"] == "gelu"
    assert found.text_encoder.config["num_hidden_layers"] == 23
    assert found.unet.config["attention_head_dim"] == [1, 1]
    assert found.unet.config["use_linear_projection"]
    assert found.scheduler["prediction_type"] == "v_prediction"
    assert found.unet.config["sample_size"] == 96


def test_averages_take_the_place_of_the_weights(tmp_path):
    """Named as ldm's LitEma names them: a weight's name without its dots."""
    prefix = "model.diffusion_model."
    averages = {
        "model_ema.diffusion_model" + name.removeprefix(prefix).replace(".", ""): tensor + 1
        for name, tensor in unet_file().items()
    }
    for averaged in (False, True):
        found = read(tmp_path, {**SD1, **averages}, averaged=averaged)
        expected = {name: each + averaged for name, each in to_tensors(tiny.unet()).items()}
        assert_same(found.unet.tensors, expected)
    with pytest.raises(UserError, match="leave out --averaged"):
        read(tmp_path, SD2, "epsilon", averaged=True)


@pytest.mark.parametrize(
    ("tensors", "metadata", "asked", "expected"),
    [
        ({**SD1, "v_pred": np.zeros(0)}, None, None, "v_prediction"),
        ({**SD2, "v_pred": np.zeros(0)}, None, None, "v_prediction"),
        (SD2, {"modelspec.prediction_type": "v"}, None, "v_prediction"),
        (SD2, {"modelspec.prediction_type": "epsilon"}, "epsilon", "epsilon"),
    ],
)
def test_what_a_file_says_that_it_predicts(tmp_path, tensors, metadata, asked, expected):
    found = read(tmp_path, tensors, asked, metadata)
    assert found.scheduler["prediction_type"] == expected


def test_classes(tmp_path):
    found = read(tmp_path, {**CLASSES, "betas": scaled_linear(0.0015, 0.0195)})
    assert_same(found.vae.tensors, to_tensors(tiny.vq()))
    assert found.vae.config["_class_name"] == "VQModel"
    assert found.vae.config["scaling_factor"] == 1.0
    assert found.class_embedder.tensors["embedding.weight"].shape == (4, tiny.WIDTH)
    assert found.scheduler["beta_end"] == 0.0195
    assert found.unet.config["attention_head_dim"] == [1, 2]


def test_a_file_becomes_a_folder(tmp_path, assert_same_weights):
    folder = epath.Path(tmp_path) / "folder"
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.json").write_bytes(b"{}")
    write_folder(read(tmp_path, SD1), folder, epath.Path(tmp_path) / "words")
    _, vae = read_autoencoder(folder / "vae")
    assert_same_weights(vae, tiny.vae())
    _, text_encoder = read_text_encoder(folder / "text_encoder")
    assert_same_weights(text_encoder, tiny.text_encoder(12))
    assert (folder / "tokenizer" / "vocab.json").read_bytes() == b"{}"
    unet = safetensors.numpy.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same_weights(to_tree(unet, tiny.unet(), source="F"), tiny.unet())


def test_a_file_is_imported_with_the_tokenizer_that_it_lacks(tmp_path, capsys, assert_same_weights):
    path, run = tmp_path / "model.safetensors", epath.Path(tmp_path) / "run"
    safetensors.numpy.save_file(SD1, path)
    arguments = ["import", "--from", str(path), "--workdir", str(run)]
    assert cli.main(arguments) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert cli.main([*arguments, "--tokenizer", str(tmp_path), "--prediction_type", "x"]) == 2
    assert "--prediction_type" in capsys.readouterr().err
    tiny.write_tokenizer(epath.Path(tmp_path) / "words")
    assert cli.main([*arguments, "--tokenizer", str(tmp_path / "words")]) == 0
    teacher = load_finished(run / "teacher")
    assert_same_weights(teacher.params, tiny.unet())
    assert teacher.description.data_shape == (64, 64, 4)
    companions = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert {each.name for each in (run / "companions").iterdir()} == companions


def without(tensors, part):
    return {name: each for name, each in tensors.items() if part not in name}


def test_a_prediction_type_that_the_file_contradicts(tmp_path):
    with pytest.raises(UserError, match="leave out --prediction_type"):
        read(tmp_path, {**SD1, "v_pred": np.zeros(0)}, "epsilon")


def test_errors_about_a_file_name_it_and_no_scratch_folder(tmp_path, capsys):
    spoiled = {**SD1, "first_stage_model.encoder.conv_out.bias": np.ones(3, np.float32)}
    safetensors.numpy.save_file(spoiled, tmp_path / "model.safetensors")
    tiny.write_tokenizer(epath.Path(tmp_path) / "words")
    arguments = ["--from", str(tmp_path / "model.safetensors"), "--workdir", str(tmp_path / "run")]
    assert cli.main(["import", *arguments, "--tokenizer", str(tmp_path / "words")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/model.safetensors/vae has the wrong shape in encoder.conv_out.bias" in said


def test_a_ckpt_is_never_read(tmp_path, capsys):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    arguments = ["--from", str(path), "--workdir", str(tmp_path / "run")]
    assert cli.main(["import", *arguments]) == 2
    assert "is a pickle" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": np.ones(1)}, "not a checkpoint of Stable Diffusion"),
        (clip_file(), r"no U-Net \(model\.diffusion_model\.\*\) and no autoencoder"),
        (unet_file(), r"no autoencoder \(first_stage_model\.\*\) and no text encoder"),
        ({**unet_file(), **clip_file()}, "no autoencoder .* holds the complete model"),
        ({**unet_file(), **vae_file(tiny.vae())}, "no text encoder"),
        ({**SD1, "cond_stage_model.embedding.weight": np.ones((2, 2))}, "a model has one of them"),
        ({**SD1, "strange": np.ones(1)}, "strange"),
        ({**SD1, "ztsnr": np.zeros(0)}, "marked ztsnr"),
        ({**SD1, "alphas_cumprod": np.ones(1000)}, "alphas_cumprod that differ"),
        ({**SD1, "scale_factor": np.array(1.0)}, "scales its latents by 1"),
        ({**SD2, **unet_file()}, "text encoder of Stable Diffusion 2 and the U-Net of Stable"),
        (
            {**UNET_2, **vae_file(tiny.vae()), **open_clip_file(22), "v_pred": np.zeros(0)},
            "lacks block 22",
        ),
        ({**SD1, **clip_file(READ_2)}, "has block 12 of the text encoder"),
        (without(SD1, "encoder.layers.11."), "lacks block 11 of the text encoder"),
        ({**SD1, "model.diffusion_model.out.2.bias": np.ones(())}, "has 0 axes"),
        ({**SD1, "strange.tensor": np.ones(1)}, "strange.tensor"),
        ({**SD1, "model.diffusion_model.label_emb.0.0.bias": np.ones(1)}, "label_emb.0.0.bias"),
        ({**SD1, "betas": scaled_linear(0.001, 0.012)}, "betas that differ"),
        (SD2, "--prediction_type"),
        (without(SD1, "out.2.bias"), "conv_out.bias"),
    ],
)
def test_other_files(tmp_path, tensors, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, tensors)
