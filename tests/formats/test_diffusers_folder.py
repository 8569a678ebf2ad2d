"""Components on disk: every way in which weights lie, and what is never read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_autoencoder import read_autoencoder
from guided_distill.formats.diffusers_folder import (
    TEXT_WEIGHTS,
    WEIGHTS,
    copy_folder,
    read_model_index,
    read_weights,
    read_weights_file,
    write_component,
)
from guided_distill.formats.json_files import read_json
from guided_distill.formats.torch_layout import to_tensors
from guided_distill.text.clip import read_text_encoder

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.arange(2, dtype=np.float32),
    "b.weight": np.ones(3, np.float32),
}


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def save(path, tensors):
    safetensors.numpy.save_file(tensors, path)


def assert_whole(tensors):
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], tensor)


def write_shards(folder, index, shards):
    where = {}
    for number, names in enumerate(shards):
        file = f"{WEIGHTS}-0000{number}-of-0000{len(shards)}.safetensors"
        save(folder / file, {name: TENSORS[name] for name in names})
        where |= dict.fromkeys(names, file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_one_file(folder):
    write_component(folder, {"x": 1}, TENSORS, WEIGHTS)
    assert_whole(read_weights(folder, WEIGHTS))
    assert read_json(folder / "config.json") == {"x": 1}
    assert {path.name for path in folder.iterdir()} == {"config.json", f"{WEIGHTS}.safetensors"}
    with safetensors.safe_open(folder / f"{WEIGHTS}.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("umask", [0o002, 0o077], ids=oct)
def test_files_follow_the_umask(folder, umask):
    before = os.umask(umask)
    try:
        write_component(folder, {"x": 1}, TENSORS, WEIGHTS)
    finally:
        os.umask(before)
    modes = {path.name: Path(path).stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == dict.fromkeys(("config.json", f"{WEIGHTS}.safetensors"), 0o666 & ~umask)


@pytest.mark.parametrize("end", [".safetensors.index.json", ".safetensors.index.fp16.json"])
def test_shards(folder, end):
    write_shards(folder, f"{WEIGHTS}{end}", [["a.weight"], ["a.bias", "b.weight"]])
    assert_whole(read_weights(folder, WEIGHTS))


def test_a_variant_is_read_where_there_is_nothing_else(folder):
    save(folder / f"{WEIGHTS}.fp16.safetensors", {"a": np.zeros(1)})
    assert read_weights(folder, WEIGHTS).keys() == {"a"}
    save(folder / f"{WEIGHTS}.safetensors", TENSORS)
    assert_whole(read_weights(folder, WEIGHTS))


def test_a_shard_that_is_missing_or_elsewhere_or_holds_a_tensor_twice(folder):
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    write_shards(folder, index.name, [["a.weight", "b.weight"], ["a.weight", "a.bias"]])
    with pytest.raises(UserError, match=r"holds a\.weight, which another shard also holds"):
        read_weights(folder, WEIGHTS)
    save(folder / "other.safetensors", TENSORS)
    (folder / "deeper").mkdir()
    for name in ("missing.safetensors", "../other.safetensors"):
        where = folder / "deeper" / index.name
        where.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="is missing"):
            read_weights(where.parent, WEIGHTS)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "weights.pt"])
def test_pickles_are_never_read(folder, name):
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(UserError, match="safe_serialization=True"):
        read_weights(folder, WEIGHTS)
    with pytest.raises(UserError, match="never read"):
        read_weights_file(folder / name)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}", b"not a file of tensors" * 9])
def test_damaged_weights(folder, content):
    (folder / f"{WEIGHTS}.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="check that the file is complete"):
        read_weights(folder, WEIGHTS)


def test_cut_weights(folder):
    write_component(folder, {}, TENSORS, WEIGHTS)
    path = folder / f"{WEIGHTS}.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="check that the file is complete"):
        read_weights(folder, WEIGHTS)


def test_no_weights(folder):
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        read_weights(folder, TEXT_WEIGHTS)


def test_folders_that_are_no_pipelines(folder):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        read_model_index(folder)
    with pytest.raises(UserError, match="neither a folder nor a file"):
        read_model_index(folder / "nothing")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_model_index(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        read_model_index(folder)


def names(folder):
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)) for path in paths}


def write(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())


def test_a_copy_is_byte_for_byte_and_of_what_a_model_is_made_of_alone(folder):
    kept = ["model_index.json", "vae/config.json", "vae/model.safetensors", "tokenizer/merges.txt"]
    others = ["vae/model.bin", "vae/model.py", "vae/model.non_ema.safetensors", ".git/config.json"]
    write(folder / "source", *kept, *others, "left/config.json")
    copy_folder(folder / "source", folder / "target", leave_out=("left",))
    assert names(folder / "target") == set(kept)
    for path in kept:
        assert (folder / "target" / path).read_text() == path


def test_a_copy_has_one_naming_for_weights_in_half_precision_alone(folder):
    """As diffusers and transformers save with variant="fp16"; `from_pretrained` looks for plain names."""
    source, target = folder / "source", folder / "target"
    write(
        source,
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    )
    write(source, *(f"both/model{mark}.safetensors" for mark in ("", ".fp16", ".bf16")))
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002" for n in (1, 2)]
    write(source, *(f"unet/{shard}.fp16.safetensors" for shard in shards))
    where = {name: f"{shard}.fp16.safetensors" for name, shard in zip("ab", shards, strict=True)}
    index = "diffusion_pytorch_model.safetensors.index"
    (source / "unet" / f"{index}.fp16.json").write_text(json.dumps({"weight_map": where}))
    copy_folder(source, target)
    assert names(target) == {
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "both/model.safetensors",
        f"unet/{index}.json",
        *(f"unet/{shard}.safetensors" for shard in shards),
    }
    assert (target / "both" / "model.safetensors").read_text() == "both/model.safetensors"
    found = json.loads((target / "unet" / f"{index}.json").read_text())["weight_map"]
    assert found == {name: f"{shard}.safetensors" for name, shard in zip("ab", shards, strict=True)}


def test_links_out_of_a_folder_are_refused_but_for_those_of_a_hubs_cache(folder):
    """Its layout: models--X/snapshots/COMMIT/vae/config.json -> ../../../blobs/HASH."""
    cache = folder / "models--some--model"
    write(cache, "blobs/abc", "snapshots/0f/model_index.json")
    (cache / "snapshots" / "0f" / "vae").mkdir()
    os.symlink("../../../blobs/abc", cache / "snapshots" / "0f" / "vae" / "config.json")
    copy_folder(cache / "snapshots" / "0f", folder / "target")
    assert (folder / "target" / "vae" / "config.json").read_text() == "blobs/abc"
    assert not os.path.islink(folder / "target" / "vae" / "config.json")

    write(folder, "secret.txt", "blobs/other", "deeper/blobs/other")
    for link in ("../secret.txt", "../blobs/other", "../deeper/blobs/other"):
        source = folder / f"source{len(list(folder.iterdir()))}"
        source.mkdir()
        os.symlink(link, source / "vocab.txt")
        with pytest.raises(UserError, match=r"vocab\.txt is a link out of"):
            copy_folder(source, folder / "refused")
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("where", [[], ["a"], {"a": 1}, None, "x"])
def test_an_index_that_maps_nothing(folder, where):
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    if where == []:
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map must name a file for each tensor"):
        read_weights(folder, WEIGHTS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "can't be read"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"null", "holds a NoneType"),
        (b"3", "holds a int"),
    ],
)
def test_files_that_are_no_json_objects(folder, content, said):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_json(folder / "config.json")


def test_an_autoencoder_is_read(folder, assert_same_weights):
    tree = tiny.vae()
    write_component(folder, tiny.VAE, to_tensors(tree), WEIGHTS)
    module, params = read_autoencoder(folder)
    assert_same_weights(tree, params)
    assert (module.block_out_channels, module.scaling_factor) == ((32, 32, 64), 0.18215)


def test_a_vq_autoencoder_is_read(folder, assert_same_weights):
    tree = tiny.vq()
    vq = {"_class_name": "VQModel", "num_vq_embeddings": 9, "scaling_factor": 1.0}
    write_component(folder, {**tiny.VAE, **vq}, to_tensors(tree), WEIGHTS)
    module, params = read_autoencoder(folder)
    assert_same_weights(tree, params)
    assert (module.num_vq_embeddings, module.scaling_factor) == (9, 1.0)


def test_a_text_encoder_is_read(folder, assert_same_weights):
    tree = tiny.text_encoder()
    write_component(folder, tiny.TEXT, to_tensors(tree), TEXT_WEIGHTS)
    module, params = read_text_encoder(folder)
    assert_same_weights(tree, params)
    assert module.hidden_act == "quick_gelu"


@pytest.mark.parametrize(
    ("read", "base", "change", "said"),
    [
        (read_autoencoder, tiny.VAE, {"_class_name": "AutoencoderTiny"}, "_class_name"),
        (read_autoencoder, tiny.VAE, {"act_fn": "relu"}, "act_fn"),
        (read_autoencoder, tiny.VAE, {"shift_factor": 0.1}, "shift_factor"),
        (read_autoencoder, tiny.VAE, {"use_quant_conv": False}, "use_quant_conv"),
        (read_autoencoder, tiny.VAE, {"latent_channels": "4"}, "latent_channels"),
        (read_autoencoder, tiny.VAE, {"scaling_factor": None}, "scaling_factor"),
        (read_autoencoder, tiny.VAE, {"scaling_factor": float("nan")}, "scaling_factor"),
        (read_autoencoder, tiny.VAE, {"scaling_factor": 0}, "scaling_factor"),
        (read_autoencoder, tiny.VAE, {"norm_num_groups": 7}, "norm_num_groups is 7, which doesn't"),
        (read_autoencoder, tiny.VAE, {"down_block_types": ["Strange"] * 3}, "down_block_types"),
        (read_autoencoder, tiny.VAE, {"down_block_types": None}, "down_block_types is None"),
        (read_autoencoder, tiny.VAE, {"up_block_types": [None] * 3}, "up_block_types is None"),
        (
            read_autoencoder,
            tiny.VAE,
            {"up_block_types": ["AttnUpDecoderBlock2D"] * 3},
            "up_block_types",
        ),
        (read_text_encoder, tiny.TEXT, {"model_type": "bert"}, "model_type"),
        (read_text_encoder, tiny.TEXT, {"hidden_act": "relu"}, "hidden_act"),
        (read_text_encoder, tiny.TEXT, {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
        (read_text_encoder, tiny.TEXT, {"hidden_size": 0}, "hidden_size"),
        (read_text_encoder, tiny.TEXT, {"num_attention_heads": 7}, "num_attention_heads is 7"),
        (read_text_encoder, tiny.TEXT, {"hidden_act": None}, "hidden_act"),
        (read_text_encoder, tiny.TEXT, {"model_type": ["clip_text_model"]}, "model_type"),
    ],
)
def test_other_companions_are_refused_by_their_key(folder, read, base, change, said):
    (folder / "config.json").write_text(json.dumps({**base, **change}))
    with pytest.raises(UserError, match=rf"config\.json: {said}"):
        read(folder)
