"""Single files in CompVis' layout, made from small models by the names that diffusers reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath

from guided_distill import cli
from guided_distill.errors import UserError
from guided_distill.interop.single_file import read_single_file, write_folder
from guided_distill.layouts.companions import read_autoencoder, read_text_encoder
from guided_distill.layouts.diffusers_configs import read_denoiser
from guided_distill.layouts.torch_layout import canonical, to_tensors, to_tree
from guided_distill.training.trained import load_finished

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


def clip_file():
    prefix = "cond_stage_model.transformer.text_model."
    made = {f"{prefix}{name}": each for name, each in to_tensors(tiny.text_encoder()).items()}
    return {**made, f"{prefix}embeddings.position_ids": np.arange(tiny.LENGTH)[None]}


def open_clip_file():
    """With one block more than Stable Diffusion 2 reads, and CLIP's other parts."""
    prefix = "cond_stage_model.model."
    tensors = to_tensors(tiny.text_encoder())
    made = {f"{prefix}positional_embedding": tensors.pop("embeddings.position_embedding.weight")}
    made[f"{prefix}token_embedding.weight"] = tensors.pop("embeddings.token_embedding.weight")
    for layer in range(2):
        for leaf in ("weight", "bias"):
            parts = [
                tensors.pop(f"encoder.layers.{layer}.self_attn.{each}_proj.{leaf}")
                for each in "qkv"
            ]
            block = f"{prefix}transformer.resblocks.{layer}"
            made[f"{block}.attn.in_proj_{leaf}"] = np.concatenate(parts)
    made |= renamed(tensors, "open_clip", prefix)
    made |= {
        name.replace("resblocks.1.", "resblocks.2."): tensor
        for name, tensor in made.items()
        if "resblocks.1." in name
    }
    return {
        **made,
        f"{prefix}logit_scale": np.ones(()),
        f"{prefix}text_projection": np.ones((2, 2)),
    }


def scaled_linear(start, end):
    return (np.linspace(start**0.5, end**0.5, 1000) ** 2).astype(np.float32)


OTHERS = {
    "model_ema.decay": np.ones(()),
    "model_ema.diffusion_modelout2weight": np.ones(3),
    "alphas_cumprod": np.ones(1000),
    "logvar": np.zeros(1000),
    "first_stage_model.loss.logvar": np.zeros(()),
}
SD1 = {**unet_file(), **vae_file(tiny.vae()), **clip_file(), **OTHERS}
SD2 = {**unet_file(linear=True), **vae_file(tiny.vae()), **open_clip_file()}
CLASSES = {
    **unet_file(),
    **vae_file(tiny.vq()),
    "cond_stage_model.embedding.weight": np.ones((4, tiny.WIDTH), np.float32),
}


def read(tmp_path, tensors, prediction_type=None):
    path = epath.Path(tmp_path) / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return read_single_file(path, prediction_type=prediction_type)


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor)


def test_stable_diffusion_1(tmp_path):
    found = read(tmp_path, {**SD1, "betas": scaled_linear(0.00085, 0.012)})
    assert_same(found.unet.tensors, to_tensors(tiny.unet()))
    assert_same(found.vae.tensors, to_tensors(tiny.vae()))
    assert_same(canonical(found.text_encoder.tensors), to_tensors(tiny.text_encoder()))
    assert found.class_embedder is None
    expected = read_denoiser({**tiny.UNET, "sample_size": 64}, "F")
    assert read_denoiser(found.unet.config, "F") == expected
    assert {key: found.vae.config[key] for key in tiny.VAE} == tiny.VAE
    assert {key: found.text_encoder.config[key] for key in tiny.TEXT} == tiny.TEXT
    assert found.scheduler["prediction_type"] == "epsilon"


def test_stable_diffusion_2(tmp_path):
    found = read(tmp_path, SD2, "v_prediction")
    assert_same(found.unet.tensors, to_tensors(tiny.unet(linear=True)))
    assert_same(found.text_encoder.tensors, to_tensors(tiny.text_encoder()))
    assert found.text_encoder.config["hidden_act"] == "gelu"
    assert found.unet.config["attention_head_dim"] == [1, 1]
    assert found.unet.config["use_linear_projection"]
    assert found.scheduler["prediction_type"] == "v_prediction"
    assert found.unet.config["sample_size"] == 96


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
    assert_same_weights(text_encoder, tiny.text_encoder())
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
    companions = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "vae"}
    assert {each.name for each in (run / "companions").iterdir()} == companions


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
        (clip_file(), "not a checkpoint of Stable Diffusion"),
        ({**SD1, "cond_stage_model.embedding.weight": np.ones((2, 2))}, "not a checkpoint"),
        ({**SD1, "strange.tensor": np.ones(1)}, "strange.tensor"),
        ({**SD1, "model.diffusion_model.label_emb.0.0.bias": np.ones(1)}, "label_emb.0.0.bias"),
        ({**SD1, "betas": scaled_linear(0.001, 0.012)}, "other betas"),
        (SD2, "--prediction_type"),
        (
            {name: each for name, each in SD1.items() if "out.2.bias" not in name},
            "conv_out.bias",
        ),
    ],
)
def test_other_files(tmp_path, tensors, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, tensors)
