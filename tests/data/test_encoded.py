import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from text_models import random_params, write_clip

from guided_distill import cli
from guided_distill.data import sources
from guided_distill.data.encode import write_encoding
from guided_distill.data.encoded import Encoding
from guided_distill.data.pipeline import batches
from guided_distill.data.source import from_arrays
from guided_distill.errors import UserError
from guided_distill.formats.torch_layout import to_tensors
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL
from guided_distill.prepare.masks import random_mask
from guided_distill.text.registry import load_text_encoder

COUNTS = {"train": 7, "test": 3}
BATCH = 4


class Words:
    """Encodes a prompt as its length, and records the prompts in `encoded`."""

    shape = (2, 3)

    def __init__(self):
        self.encoded = []

    def encode(self, prompts):
        self.encoded += prompts
        return np.array([np.full(self.shape, len(prompt)) for prompt in prompts], np.float32)


class Quarters:
    """Encodes images as every second pixel of the first channel, and fails after `allowed` calls."""

    def __init__(self, allowed=1000):
        self.calls, self.allowed = 0, allowed

    def __call__(self, images):
        assert images.shape == (BATCH, 4, 4, 3)
        self.calls += 1
        if self.calls > self.allowed:
            raise KeyboardInterrupt
        return 2 * images[:, ::2, ::2, :1]


def data(split, *, captions=True):
    rng = np.random.default_rng(len(split))
    count = COUNTS[split]
    words = np.array([f"{split} {'x' * (index % 3)}" for index in range(count)])
    return from_arrays(
        "toy",
        split=split,
        images=rng.integers(0, 256, (count, 4, 4, 3), np.uint8),
        labels=np.arange(count) % 2,
        class_names=["a", "b"],
        captions=words if captions else None,
    )


def encode(out, *, latents=None, words=None, **changes):
    labelled = words is None
    values = {
        "data": "toy",
        "image_size": None,
        "autoencoder": "quarters",
        "text_encoder": None if labelled else "words",
        "shape": (2, 2, 1),
        "text_shape": None if labelled else Words.shape,
        "class_names": ("a", "b"),
        "mirrored": False,
        "sizes": COUNTS,
        "shard_size": 3,
        **changes,
    }
    write_encoding(
        epath.Path(out),
        Encoding(**values),
        {split: data(split, captions=not labelled) for split in sources.SPLITS},
        to_latents=latents or Quarters(),
        to_states=None if labelled else words.encode,
        batch_size=BATCH,
    )


@pytest.mark.parametrize("split", sources.SPLITS)
def test_labels_and_latents_of_every_example(tmp_path, split):
    encode(tmp_path)
    source = sources.load_source(f"encoded:{tmp_path}", split=split)
    assert (len(source), source.shape, source.latent) == (COUNTS[split], (2, 2, 1), True)
    assert (source.class_names, source.null) == (("a", "b"), None)
    found, plain = source.arrays(), data(split).arrays()
    assert found["image"].dtype == np.float32
    np.testing.assert_allclose(found["image"], 2 * plain["image"][:, ::2, ::2, :1], atol=1e-3)
    np.testing.assert_array_equal(found["label"], plain["label"])
    assert found["label"].dtype == np.int32
    some = np.array([5, 0, 5]) % COUNTS[split]
    np.testing.assert_array_equal(source.read(some)["image"], found["image"][some])


def test_each_caption_is_encoded_once_and_stays_with_its_images(tmp_path):
    words = Words()
    encode(tmp_path, words=words)
    assert sorted(words.encoded) == [
        "",
        *("test ", "test x", "test xx"),
        *("train ", "train x", "train xx"),
    ]
    source = sources.load_source(f"encoded:{tmp_path}")
    assert dict(source.condition_shapes) == {"text": (2, 3)}
    np.testing.assert_array_equal(source.null["text"], np.zeros((2, 3)))
    np.testing.assert_array_equal(source.captions, data("train").captions)
    found = source.arrays()
    assert set(found) == {"image", "text"}
    np.testing.assert_array_equal(found["text"][:, 1, 2], 6 + np.arange(7) % 3)
    batch = next(batches(source, batch_size=5, seed=0))
    assert (batch["image"].shape, batch["text"].shape) == ((5, 2, 2, 1), (5, 2, 3))


def test_mirror_images_have_their_own_latents(tmp_path):
    encode(tmp_path, words=Words(), mirrored=True)
    source = sources.load_source(f"encoded:{tmp_path}")
    images = data("train").arrays()["image"]
    assert len(source) == 14
    found = source.arrays()
    upright, mirrored = found["image"][::2], found["image"][1::2]
    np.testing.assert_allclose(upright, 2 * images[:, ::2, ::2, :1], atol=1e-3)
    np.testing.assert_allclose(mirrored, 2 * images[:, ::2, ::-1][:, :, ::2, :1], atol=1e-3)
    np.testing.assert_array_equal(found["text"][::2], found["text"][1::2])
    np.testing.assert_array_equal(source.captions[1::2], data("train").captions)
    assert len(sources.load_source(f"encoded:{tmp_path}", split="test")) == 3
    with pytest.raises(UserError, match=r"data\.flip can't mirror latents.*encode --flip"):
        batches(source, batch_size=2, seed=0, flip=True)


def test_interrupted_encoding_resumes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    once = Quarters()
    encode(whole, latents=once, words=Words())
    with pytest.raises(KeyboardInterrupt):
        encode(cut, latents=Quarters(allowed=2), words=Words())
    with pytest.raises(UserError, match=r"image-00002-of-00003.*didn't finish"):
        sources.load_source(f"encoded:{cut}")
    again = Quarters()
    encode(cut, latents=again, words=Words())
    assert again.calls == once.calls - 2
    assert files(cut) == files(whole)
    more = Quarters()
    encode(cut, latents=more, words=Words())
    assert more.calls == 0


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder": "halves"}, r"whose autoencoder is quarters, not halves"),
        ({"shard_size": 4}, r"whose shard_size is 3, not 4"),
        ({"mirrored": True}, r"whose mirrored is False, not True"),
    ],
)
def test_another_encoding_is_never_mixed_in(tmp_path, changes, message):
    encode(tmp_path)
    with pytest.raises(UserError, match=message + r".*another --out"):
        encode(tmp_path, **changes)


def test_damage_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no encoded data.*guided-distill encode"):
        sources.load_source(f"encoded:{tmp_path}")
    with pytest.raises(UserError, match=r"quarters encodes toy to latents that are not finite"):
        encode(tmp_path / "nan", latents=lambda images: np.full((BATCH, 2, 2, 1), 1e6))
    encode(tmp_path, words=Words())
    shard = tmp_path / "train" / "image-00001-of-00003.array_record"
    whole = shard.read_bytes()
    for damaged in (whole[:100], shard.with_name("image-00002-of-00003.array_record").read_bytes()):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"image-00001-of-00003\.array_record is damaged"):
            sources.load_source(f"encoded:{tmp_path}")
    shard.write_bytes(whole)
    (tmp_path / "null.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"null\.npy can't be read"):
        sources.load_source(f"encoded:{tmp_path}")
    about = json.loads((tmp_path / "encoding.json").read_text())
    (tmp_path / "encoding.json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(UserError, match=r"encoding\.json doesn't describe an encoding \(format 2"):
        sources.load_source(f"encoded:{tmp_path}")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("encoding.json", {"shape": [2, 2]}, "shape is .2, 2."),
        ("encoding.json", {"shape": [2, 2, 3]}, r"image.* \(a record has 12 bytes instead of 28"),
        ("encoding.json", {"text_shape": [2, True]}, "text_shape is .2, True."),
        ("encoding.json", {"text_shape": [2, 4]}, r"text.* \(a record has 12 bytes instead of 16"),
        ("encoding.json", {"sizes": {"train": 7, "test": "3"}}, "sizes is"),
        ("encoding.json", {"sizes": 3}, "encoding.json doesn't describe an encoding"),
        ("encoding.json", {"mirrored": "no"}, "mirrored is 'no'"),
        ("encoding.json", {"shard_size": 0}, "shard_size is 0"),
        ("train/captions.json", ["a"] * 6, "must be a list of 7 strings"),
        ("train/captions.json", ["a", {}] * 4, "must be a list of 7 strings"),
        ("null.npy", np.zeros((2, 4)), "float64 .2, 4. but must be floats .2, 3."),
    ],
)
def test_files_that_do_not_fit_each_other_are_named(tmp_path, file, changes, message):
    encode(tmp_path, words=Words())
    if file == "null.npy":
        np.save(tmp_path / file, changes)
    else:
        whole = json.loads((tmp_path / file).read_text())
        new = changes if isinstance(whole, list) else whole | changes
        (tmp_path / file).write_text(json.dumps(new))
    with pytest.raises(UserError, match=message):
        sources.load_source(f"encoded:{tmp_path}")


@pytest.fixture
def captioned(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
    path = tmp_path / "captioned.npz"
    np.savez(path, image=images, caption=np.array([f"number {i % 5}" for i in range(12)]))
    return f"npz:{path}"


@pytest.fixture
def autoencoder(tmp_path):
    """A folder with a small autoencoder, its module and its weights."""
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
    module = AutoencoderKL(**sizes, latent_channels=2, scaling_factor=0.5)
    params = random_params(module, jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32))
    folder = tmp_path / "vae"
    folder.mkdir()
    config = {"_class_name": "AutoencoderKL", **sizes, "latent_channels": 2, "scaling_factor": 0.5}
    config["down_block_types"] = ["DownEncoderBlock2D"] * 2
    config["up_block_types"] = ["UpDecoderBlock2D"] * 2
    (folder / "config.json").write_text(json.dumps(config))
    tensors = to_tensors(params)
    safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder, module, params


def test_the_verb_encodes_with_an_autoencoder_and_a_text_encoder(
    tmp_path, captioned, autoencoder, capsys
):
    folder, module, params = autoencoder
    write_clip(tmp_path)
    command = ["encode", "--data", captioned, "--autoencoder", str(folder)]
    command += ["--text_encoder", f"clip:{tmp_path}", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out'}\n")
    source = sources.load_source(f"encoded:{tmp_path / 'out'}")
    plain = sources.load_source(captioned)
    found = source.arrays()
    expected = module.apply({"params": params}, plain.arrays()["image"], method="to_latents")
    assert source.shape == (4, 4, 2)
    np.testing.assert_allclose(found["image"], expected, atol=2e-3)
    encoder = load_text_encoder(f"clip:{tmp_path}")
    np.testing.assert_allclose(found["text"], encoder.encode(plain.captions), atol=4e-3)
    np.testing.assert_allclose(source.null["text"], encoder.encode([""])[0], atol=1e-6)

    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    safetensors.numpy.save_file({name: 2 * each for name, each in tensors.items()}, weights)
    assert cli.main(command) == 2
    assert "whose autoencoder is" in capsys.readouterr().err


def test_bad_arguments_of_the_verb(tmp_path, captioned, autoencoder, capsys):
    folder, *_ = autoencoder
    command = ["encode", "--autoencoder", str(folder), "--out", str(tmp_path / "out")]
    for arguments, message in (
        (["--data", "digits", "--shard_size", "0"], "--shard_size is 0; make it at least 1"),
        (["--data", "digits"], "takes images of 3 channels, but examples of digits are [8, 8, 1]"),
        (["--data", captioned, "--text_encoder", "t5"], "unknown text encoder 't5'"),
    ):
        assert cli.main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    write_clip(tmp_path)
    np.savez(tmp_path / "plain.npz", image=np.zeros((20, 8, 8, 3), np.uint8))
    command += ["--data", f"npz:{tmp_path}/plain.npz", "--text_encoder", f"clip:{tmp_path}"]
    assert cli.main(command) == 2
    assert "has no captions to encode: leave out --text_encoder" in capsys.readouterr().err


def test_states_of_old_captions_are_not_used_for_others(tmp_path):
    encode(tmp_path, words=Words())
    path = tmp_path / "train" / "captions.json"
    path.write_text(path.read_text().replace("train xx", "train zz"))
    with pytest.raises(UserError, match=r"train/captions\.json holds captions that differ"):
        encode(tmp_path, words=Words())


def test_masks_match_the_masked_latents_and_differ_by_record(tmp_path):
    for name in ("one", "other"):
        encode(tmp_path / name, inpaint=True, mirrored=True)
    one, other = (
        sources.load_source(f"encoded:{tmp_path / name}").arrays()["inpaint"]
        for name in ("one", "other")
    )
    np.testing.assert_array_equal(one, other)
    assert one.shape == (14, 2, 2, 2)
    source = sources.load_source(f"encoded:{tmp_path / 'one'}")
    assert source.condition_shapes == {"label": (), "inpaint": (2, 2, 2)}
    mask, masked = one[..., 0], one[..., 1]
    assert set(np.unique(mask)) == {0, 1}
    # Latents of Quarters are pixels: zero under the mask, and the image's elsewhere.
    np.testing.assert_array_equal(masked[mask == 1], 0)
    kept = mask == 0
    np.testing.assert_array_equal(masked[kept], source.arrays()["image"][..., 0][kept])
    assert len({each.tobytes() for each in mask}) > 1


def test_random_masks_are_boxes_or_everything():
    masks = [random_mask(np.random.default_rng(seed), 20, 30) for seed in range(400)]
    whole = np.mean([mask.all() for mask in masks])
    assert 0.15 < whole < 0.35
    assert all(mask.any() for mask in masks)
    corners = np.mean([mask[[0, 0, -1, -1], [0, -1, 0, -1]].any() for mask in masks])
    assert whole < corners < 0.95
