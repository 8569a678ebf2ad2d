"""A small text-to-image run with its own latent space, and the images that its students make."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from text_models import write_clip_of_both, write_minilm

import guided_distill
from guided_distill import cli, run_data
from guided_distill.applications import text_to_image
from guided_distill.applications.text_to_image import edit, generate, inpaint, load_text_to_image
from guided_distill.data.encoded import INPAINT
from guided_distill.data.pixels import from_uint8, to_uint8
from guided_distill.errors import UserError
from guided_distill.runs.folder import finished_stages
from guided_distill.runs.trained import read_finished
from guided_distill.sampling.latents import load_latent_space
from guided_distill.sampling.sample import initial_noise, sample

SIDE = 16
PROMPTS = ["red apple", "two apples"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_minilm(folder / "minilm")
    count = 80
    np.savez(
        folder / "drawings.npz",
        image=np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8),
        label=np.arange(count) % 3,
        caption=np.array(PROMPTS * (count // 2)),
        group=np.arange(count) // 2,
    )
    return [
        "--config=configs/emoji.py:runlocal",
        f"--config.data.name=npz:{folder / 'drawings.npz'}",
        f"--config.data.image_size={SIDE}",
        f"--config.data.text_encoder=minilm:{folder / 'minilm'}",
        "--config.model.options.cross_attention_dim=24",
    ]


@pytest.fixture(scope="module")
def workdir(arguments, tmp_path_factory):
    path = epath.Path(tmp_path_factory.mktemp("run"))
    assert cli.main(["train", "--workdir", str(path), *arguments]) == 0
    return path


@pytest.fixture(scope="module")
def model(workdir):
    """The model with random nonzero weights, because so little training hardly changes it."""
    loaded = load_text_to_image(workdir / "halving_ddim_2")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), loaded.trained.params
    )
    return replace(loaded, trained=replace(loaded.trained, params=params))


def images():
    return np.random.default_rng(1).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)


def test_every_stage_is_trained_on_latents_of_texts(workdir, arguments):
    assert finished_stages(workdir) == ["teacher", "guidance", "halving_ddim_2", "halving_ddim_1"]
    index = json.loads((workdir / "companions" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "BertModel"]
    space = load_latent_space(workdir)
    train = np.load(arguments[1].partition("npz:")[2])["image"] / 127.5 - 1
    assert 0.5 < space.to_latents(train.astype(np.float32)).std() < 2


def test_nothing_starts_from_an_autoencoder(workdir):
    with pytest.raises(UserError, match="is an autoencoder: give the folder of a stage"):
        read_finished(workdir / "autoencoder")


def test_a_finished_run_is_left_as_it_is(workdir, arguments, capsys):
    def files():
        """The files that training and encoding wrote, with their times."""
        paths = [*Path(workdir).rglob("checkpoints/*/_CHECKPOINT_METADATA")]
        for suffix in ("safetensors", "array_record"):
            paths += Path(workdir).rglob(f"*.{suffix}")
        return sorted((str(path), path.stat().st_mtime_ns) for path in paths)

    before = files()
    assert len(before) > 8
    assert cli.main(["train", "--workdir", str(workdir), *arguments]) == 0
    assert capsys.readouterr().err.count("is done") == 4
    assert files() == before


def test_images_depend_on_their_own_text_and_seed_alone(model):
    one, two = (generate(model, [*PROMPTS, PROMPTS[0]][:n], w=1.0, seed=3) for n in (3, 1))
    assert one.shape == (3, SIDE, SIDE, 3)
    np.testing.assert_allclose(one[:1], two, atol=1e-4)
    other = generate(model, [PROMPTS[1]], w=1.0, seed=3)
    assert np.abs(other - two).max() > 2e-3
    assert np.abs(one[0] - one[2]).max() > 1e-3


def test_a_student_needs_no_empty_text(model, monkeypatch):
    encoded = []
    encode = type(model.text_encoder).encode

    def spy(encoder, prompts):
        encoded.extend(prompts)
        return encode(encoder, prompts)

    monkeypatch.setattr(type(model.text_encoder), "encode", spy)
    generate(model, PROMPTS[:1], w=1.0)
    assert encoded == PROMPTS[:1]


def test_editing_runs_the_steps_that_its_strength_leaves(model):
    whole = edit(model, images(), PROMPTS, strength=1.0, w=1.0)
    half = edit(model, images(), PROMPTS, strength=0.7, w=1.0)
    assert (whole.steps_run, half.steps_run) == (2, 1)
    other = edit(model, images()[::-1], PROMPTS, strength=0.7, w=1.0)
    assert np.abs(other.images - half.images).max() > 1e-3
    with pytest.raises(UserError, match=r"give 0\.5 to 1"):
        edit(model, images(), PROMPTS, strength=0.4, w=1.0)


@pytest.fixture
def asked(monkeypatch):
    """The requests to the sampler, which is replaced by one that returns its starting point."""
    requests = []

    def return_start(trained, request):
        requests.append(request)
        return request.noise

    monkeypatch.setattr(text_to_image, "sample", return_start)
    return requests


@pytest.mark.parametrize(("strength", "first"), [(0.3, 1), (0.5, 2), (0.99, 3), (1.0, 4)])
def test_editing_starts_from_images_noised_as_far_as_its_strength(model, asked, strength, first):
    steps = {"num_steps": 4, "allow_untrained": True}
    edit(model, images(), PROMPTS, strength=strength, w=1.0, seed=5, **steps)
    (request,) = asked
    assert (request.first, request.num_steps) == (first, 4)
    # The one of Stable Diffusion's thousand noise levels at t = first / 4.
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[250 * first - 1]
    latents = model.space.to_latents(images())
    noise = initial_noise(model.trained.description, 2, seed=5)
    expected = np.sqrt(kept) * latents + np.sqrt(1 - kept) * noise
    np.testing.assert_allclose(request.noise, expected, atol=1e-4)


def test_the_strength_that_an_error_names_makes_one_step_run(model, asked):
    def steps_run(strength, num_steps):
        how = {"w": 1.0, "num_steps": num_steps, "allow_untrained": True}
        return edit(model, images()[:1], PROMPTS[:1], strength=strength, **how).steps_run

    for num_steps in range(1, 65):
        with pytest.raises(UserError) as refused:
            steps_run(0.9 / num_steps, num_steps)
        named = re.search(r"give (\S+) to 1", str(refused.value))[1]
        assert steps_run(float(named), num_steps) == 1


def test_inpainting_keeps_every_pixel_outside_of_the_mask(model):
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[:, 4:12, 6:] = True
    painted = inpaint(model, images(), masks, PROMPTS, w=1.0)
    np.testing.assert_array_equal(painted[~masks], images()[~masks])
    for changed in ({"prompts": PROMPTS[::-1]}, {"seed": 1}, {"w": 3.0}):
        asked = {"prompts": PROMPTS, "w": 1.0, "seed": 0} | changed
        other = inpaint(model, images(), masks, **asked)
        np.testing.assert_array_equal(other[~masks], images()[~masks])
        assert np.abs(other - painted)[masks].max() > 1e-3


def some_masks():
    """Masks of pixels, and two masks of latents: the upper left pixel, and the maximum, of 2 x 2."""
    masks = np.random.default_rng(2).random((2, SIDE, SIDE)) < 0.3
    corners = [masks[:, i::2, j::2] for i in range(2) for j in range(2)]
    return masks, corners[0], np.maximum.reduce(corners)


def test_inpainting_gives_the_sampler_the_known_part(model, asked):
    masks, _, free = some_masks()
    inpaint(model, images(), masks, PROMPTS, w=1.0, seed=5)
    (request,) = asked
    noise = initial_noise(model.trained.description, 2, seed=5)
    np.testing.assert_array_equal(request.noise, noise)
    known = request.known
    np.testing.assert_array_equal(known.x, model.space.to_latents(images()))
    np.testing.assert_array_equal(known.eps, noise)
    np.testing.assert_array_equal(known.free, free[..., None])


def test_inpainting_keeps_the_latents_outside_of_the_mask(model, monkeypatch):
    sampled = []

    def spy(trained, request):
        sampled.append(sample(trained, request))
        return sampled[0]

    monkeypatch.setattr(text_to_image, "sample", spy)
    masks, _, free = some_masks()
    inpaint(model, images(), masks, PROMPTS, w=1.0)
    changes = np.abs(sampled[0] - model.space.to_latents(images()))
    assert changes[~free].max() < 1e-6
    assert changes[free].min(axis=-1).mean() > 0.01


def test_an_inpainting_network_is_conditioned_on_the_mask_and_its_surroundings(model, asked):
    about = model.trained.description
    told = {**about.condition_shapes, INPAINT: (*about.data_shape[:2], 1 + about.data_shape[2])}
    of_masks = replace(about, condition_shapes=told)
    of_masks = replace(model, trained=replace(model.trained, description=of_masks))
    masks, nearest, _ = some_masks()
    inpaint(of_masks, images(), masks, PROMPTS, w=1.0, seed=5)
    (request,) = asked
    with_holes = images()
    with_holes[masks] = 0.0
    mask, around = np.split(request.condition[INPAINT], [1], axis=-1)
    np.testing.assert_array_equal(mask, nearest[..., None])
    np.testing.assert_array_equal(around, model.space.to_latents(with_holes))
    np.testing.assert_array_equal(request.noise, initial_noise(about, 2, seed=5))
    assert request.known is None


def run(verb, workdir, out, *more):
    return cli.main([verb, "--workdir", str(workdir), "--out", str(out), *more])


def test_files_say_how_they_were_made(workdir, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfred apple\n\ntwo apples\n")
    asked = ["--prompts", str(tmp_path / "prompts.txt"), "--num", "2", "--w", "2", "--seed", "5"]
    assert run("generate", workdir, tmp_path / "out", *asked) == 0
    paths = capsys.readouterr().out.split()
    assert len(paths) == 5
    assert Path(paths[0]).stem.endswith("_0000_red_apple")
    with Image.open(paths[2]) as image:
        assert image.size == (SIDE, SIDE)
        said = json.loads(image.info["guided_distill"])
    wanted = {"verb": "generate", "stage": "halving_ddim_1", "w": 2.0, "seed": 5, "index": 2}
    assert wanted.items() <= said.items()
    assert said["prompt"] == "two apples"


def test_evaluation_looks_at_images_of_held_out_captions(workdir):
    asked = ["--w", "1", "--extractor", "lite0"]
    assert cli.main(["evaluate", "--workdir", str(workdir), *asked]) == 0
    rows = (workdir / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 1 + (1 + 1 + 2)
    alignments = [row["alignment"] for row in csv.DictReader(rows)]
    assert all(-1 <= float(each) <= 1 for each in alignments)
    with np.load(workdir / "samples" / "halving_ddim_1_w1.npz") as samples:
        assert samples["image"].shape[1:] == (SIDE, SIDE, 3)


def test_evaluation_with_clip_reports_its_score(workdir, tmp_path):
    write_clip_of_both(tmp_path)
    asked = ["--stages", "halving_ddim_1", "--w", "0", "--extractor", f"clip:{tmp_path}"]
    assert cli.main(["evaluate", "--workdir", str(workdir), *asked]) == 0
    rows = list(csv.DictReader((workdir / "results.csv").read_text().splitlines()))
    of_clip = [row for row in rows if row["extractor"].startswith("clip-")]
    assert [row["stage"] for row in of_clip] == ["real", "halving"]
    for row in of_clip:
        assert -1 <= float(row["alignment"]) <= 1
        assert row["inception_score"] == row["accuracy"] == ""


def test_a_loaded_run_does_the_same(workdir, model):
    loaded = guided_distill.load(workdir / "halving_ddim_2")
    loaded = replace(loaded, prompted=model)
    images = loaded.sample(prompts=PROMPTS, seed=3)
    np.testing.assert_array_equal(images, generate(model, PROMPTS, w=1.0, seed=3))
    edited = loaded.edit(images, PROMPTS, strength=0.5, w=0.0)
    expected = edit(model, images, PROMPTS, strength=0.5, w=0.0).images
    np.testing.assert_array_equal(edited, expected)
    masks = np.zeros(images.shape[:-1], bool)
    masks[:, :4] = True
    np.testing.assert_array_equal(
        loaded.inpaint(images, masks, PROMPTS), inpaint(model, images, masks, PROMPTS, w=1.0)
    )
    for request, message in (
        (lambda: loaded.sample(labels=[1]), "give prompts"),
        (lambda: loaded.edit(images, PROMPTS[:1], strength=0.5), "one for each prompt"),
        (lambda: loaded.inpaint(images, masks[:1], PROMPTS), "True in the region to paint"),
        (lambda: loaded.encode(images, labels=[1, 2]), "can't encode"),
    ):
        with pytest.raises(UserError, match=message):
            request()


def test_its_page_samples_edits_and_inpaints(workdir, served, tmp_path, monkeypatch):
    # Pillow would call it to render a file that claims to be an image but is a program.
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "program.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    )
    Image.new("1", (2**14, 2**13)).save(tmp_path / "bomb.png")
    client = Client(served(Path(workdir)), verbose=False)
    model = guided_distill.load(workdir / "halving_ddim_2")
    image, mask = (np.full((1, SIDE, SIDE, 3), 200, np.uint8), np.zeros((SIDE, SIDE), np.uint8))
    mask[4:12, 6:] = 255
    for name, array in (("image", image[0]), ("mask", mask)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    image_file, mask_file = (handle_file(tmp_path / f"{name}.png") for name in ("image", "mask"))
    drawing = {"background": image_file, "layers": [], "composite": None}
    # Stage, w, steps, seed and number.
    chosen = ("halving_ddim_2", 2.0, None, 5, 1)
    asked = {"prompts": PROMPTS[:1], "w": 2.0, "seed": 5}
    given = from_uint8(image)
    for verb, inputs, expected in (
        ("sample", (PROMPTS[0], False, 2), model.sample(**asked)),
        ("edit", (image_file, PROMPTS[0], 0.5), model.edit(given, strength=0.5, **asked)),
        (
            "inpaint",
            (drawing, mask_file, PROMPTS[0]),
            model.inpaint(given, mask[None] > 0, **asked),
        ),
    ):
        words, gallery, *_ = client.predict(*inputs, *chosen, api_name=f"/{verb}")
        drawn = np.asarray(Image.open(gallery["value"][0]["image"])).astype(int)
        assert np.abs(drawn - to_uint8(expected)[0]).max() <= 1
        assert f"{1 if verb == 'edit' else 2} network call" in words
    for verb, inputs, said in (
        ("sample", (" ", False, 2), "there is no prompt"),
        ("sample", ("a" * 1001, False, 2), "has 1001 characters"),
        ("edit", (handle_file(tmp_path / "bomb.png"), "a", 0.5), "exceeds limit"),
        ("edit", (handle_file(tmp_path / "program.png"), "a", 0.5), "Ghostscript"),
        ("edit", (None, "a", 0.5), "there is no image"),
        ("edit", (image_file, "a", 0.3), "give 0.5 to 1"),
        ("inpaint", (drawing, None, "a"), "nothing is painted over"),
    ):
        with pytest.raises(AppError, match=said):
            client.predict(*inputs, *chosen, api_name=f"/{verb}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("verb", "more", "said"),
    [
        ("generate", [], "there is no prompt"),
        ("generate", ["--prompts", "nothing.txt"], "nothing.txt can't be read"),
        ("generate", ["--prompt", "a", "--w", "9"], "outside the range"),
        ("sample", [], "use `guided-distill generate`"),
        ("edit", ["--prompt", "a", "--image", "{image}", "--strength", "nan"], "--strength is nan"),
        ("edit", ["--prompt", "a", "--image", "none.png"], "no images at none.png"),
        ("edit", ["--prompt", "a", "--image", "{image}", "--strength", "0"], "--strength is 0"),
        ("inpaint", ["--prompt", "a", "--image", "{image}", "--mask", "{mask}"], "is 8 x 9 pixels"),
        ("inpaint", ["--prompt", "a", "--image", "{image}", "--mask", "{text}"], "as an image"),
        (
            "inpaint",
            ["--prompt", "a", "--image", "{image}", "--mask", "{clear}"],
            "has no white pixel",
        ),
        ("inpaint", ["--prompt", "a", "--image", "{image}", "--mask", "none"], "no image at none"),
        ("generate", ["--prompt", "caf\udce9"], "can't be encoded in UTF-8"),
        ("generate", ["--prompts", "{text}"], ": save it in UTF-8"),
    ],
)
def test_bad_input_is_one_sentence(workdir, tmp_path, capsys, verb, more, said):
    places = {name: str(tmp_path / f"{name}.png") for name in ("image", "mask", "text", "clear")}
    Image.new("RGBA", (SIDE, SIDE)).save(places["clear"])
    Image.new("RGB", (SIDE, SIDE)).save(places["image"])
    Image.new("L", (8, 9)).save(places["mask"])
    (tmp_path / "text.png").write_bytes(b"no picture, \xe9")
    assert run(verb, workdir, tmp_path / "out", *(each.format(**places) for each in more)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("guided-distill: ")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_a_run_from_another_runs_teacher_has_its_autoencoder(workdir, arguments, tmp_path):
    start = [f"--config.start_from={workdir / 'teacher'}", "--config.stage=guidance"]
    changed = ["--config.guidance.w_max=9.0", "--config.seed=1", "--config.guidance.steps=2"]
    assert cli.main(["train", "--workdir", str(tmp_path), *arguments, *start, *changed]) == 0
    assert not (tmp_path / "autoencoder").exists()
    vae = "companions/vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / vae).read_bytes() == (workdir / vae).read_bytes()
    assert load_text_to_image(epath.Path(tmp_path) / "guidance").trained.description.w_max == 9.0


def test_exported_weights_bring_their_companions(workdir, tmp_path):
    stages = ["--stages", "halving_ddim_1"]
    assert run("export", workdir, tmp_path / "out", *stages) == 0
    (whole,), (exported,) = (
        generate(load_text_to_image(epath.Path(folder) / "halving_ddim_1"), PROMPTS[:1], w=1.0)
        for folder in (workdir, tmp_path / "out")
    )
    np.testing.assert_array_equal(whole, exported)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.text_encoder=minilm:/nowhere", "no folder /nowhere"),
        ("data.text_encoder=bert", "unknown text encoder 'bert'"),
        ("model.options.norm_num_group=3", "norm_num_group"),
        ("guidance.clipped=True", "config.guidance.clipped"),
        ("data.image_size=9", "multiple of 2"),
        ("teacher.initial={guidance}", "is a guidance stage"),
    ],
)
def test_bad_configs_are_reported_before_the_autoencoder_is_trained(
    workdir, arguments, tmp_path, capsys, change, said
):
    change = f"--config.{change.format(guidance=workdir / 'guidance')}"
    out = tmp_path / "run"
    assert cli.main(["train", "--workdir", str(out), *arguments, change]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not (out / "autoencoder").exists()


def test_the_autoencoder_is_trained_in_as_many_parts_as_asked(
    arguments, tmp_path, capsys, monkeypatch
):
    def tell_size(module, params, x, key, **settings):
        raise UserError(f"{len(x)} at once")

    monkeypatch.setattr(run_data, "autoencoder_loss", tell_size)
    parts = ["--config.autoencoder.batch_size=8", "--config.autoencoder.accumulation=2"]
    assert cli.main(["train", "--workdir", str(tmp_path / "run"), *arguments, *parts]) == 2
    assert "4 at once" in capsys.readouterr().err
