"""A student as a program: the same samples, by a script that knows nothing of this package."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from flax.traverse_util import flatten_dict

from guided_distill import cli
from guided_distill.config import parse
from guided_distill.formats.stablehlo_export import export_sampler
from guided_distill.runs.trained import Description, load_finished
from guided_distill.sampling.labels import cycling_labels, of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_arguments):
    path = epath.Path(tmp_path_factory.mktemp("run"))
    more = [
        "--config.halving.samplers=('stochastic','encode')",
        "--config.halving.last_num_steps=2",
    ]
    assert cli.main(["train", "--workdir", str(path), *tiny_arguments, *more]) == 0
    return path


def test_a_script_without_this_package_draws_the_same(workdir, tmp_path):
    out = tmp_path / "student"
    asked = ["--format", "stablehlo", "--stages", "halving_stochastic_2", "--out", str(out)]
    assert cli.main(["export", "--workdir", str(workdir), *asked]) == 0
    script = (out / "run_stablehlo.py").read_text()
    assert "guided_distill" not in script
    trained = load_finished(workdir / "halving_stochastic_2")
    for count, w, seed in ((5, 1.5, 3), (12, 0.0, 0)):
        run_script(out, "run_stablehlo.py", f"--num={count}", f"--w={w}", f"--seed={seed}")
        with np.load(out / "samples.npz") as drawn:
            labels = cycling_labels(count, 10)
            np.testing.assert_array_equal(drawn["label"], labels)
            expected = sample(trained, Request(condition=of_labels(labels), w=w, seed=seed))
            np.testing.assert_allclose(drawn["image"], expected, atol=1e-5)
            assert drawn["image"].std() > 0.1


def test_it_is_for_every_platform(workdir, tmp_path):
    out = tmp_path / "student"
    asked = ["--format", "stablehlo", "--stages", "halving_stochastic_2", "--out", str(out)]
    assert cli.main(["export", "--workdir", str(workdir), *asked]) == 0
    program = jax.export.deserialize(bytearray((out / "sampler.stablehlo").read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    assert str(program.out_avals[0].shape) == "(B, 8, 8, 1)"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("halving_encode_2", "not a student that is conditioned on w"),
        ("teacher", "not a student that is conditioned on w"),
        ("teacher,guidance", "2 are given: name one with --stages"),
    ],
)
def test_what_cannot_be_a_sampler_is_refused(workdir, tmp_path, capsys, stages, said):
    asked = ["--format", "stablehlo", "--stages", stages, "--out", str(tmp_path / "out")]
    assert cli.main(["export", "--workdir", str(workdir), *asked]) == 2
    assert said in capsys.readouterr().err


def test_a_script_draws_what_texts_ask_for(tmp_path):
    """With states and weights of its own, and no class."""
    run = epath.Path(tmp_path / "run")
    source = tiny.write_pipeline(tmp_path / "source")
    assert cli.main(["import", "--from", str(source), "--workdir", str(run)]) == 0
    stage = tiny.add_student(run, num_steps=1, sampler="ddim")
    asked = ["--format", "stablehlo", "--stages", stage, "--out", str(tmp_path / "out")]
    assert cli.main(["export", "--workdir", str(run), *asked]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'condition["text"] | float32 [B, {tiny.LENGTH}, {tiny.WIDTH}]' in card
    assert "The tokenizer and the text encoder" in card
    assert "The autoencoder" in card

    text = np.random.default_rng(0).standard_normal((3, tiny.LENGTH, tiny.WIDTH), np.float32)
    np.savez(tmp_path / "out" / "condition.npz", text=text)
    (command,) = re.findall(r"^    python (.*)$", card, re.MULTILINE)
    run_script(tmp_path / "out", *command.replace("--w 1 ", "--w 3.5 ").split())
    with np.load(tmp_path / "out" / "samples.npz") as drawn:
        expected = sample(
            load_finished(run / stage), Request(condition={"text": text}, w=3.5, seed=0)
        )
        np.testing.assert_allclose(drawn["latent"], expected, atol=1e-4)
    for arguments, said in (
        ([], "give --condition, an npz file with text"),
        (["--condition", "samples.npz"], "lacks text"),
        (["--w", "20"], "choose one from 1.0 to 13.0"),
    ):
        refused = run_script(tmp_path / "out", "run_stablehlo.py", *arguments, check=False)
        assert refused.returncode == 2
        assert said in refused.stderr


def run_script(folder, *arguments, check=True):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=check,
        capture_output=True,
        text=True,
    )


NETWORKS = {
    "unet": {
        "width": 16,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (4,),
        "head_width": 16,
        "embedding_width": 16,
        "patch_size": 2,
    },
    "transformer": {
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "patch_size": 4,
        "embedding_width": 16,
    },
    "dit": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
    "sd_unet": {
        "block_out_channels": (16,),
        "cross_attention_levels": (0,),
        "num_attention_heads": (2,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_exported_for_any_number_of_samples(name):
    text = name == "sd_unet"
    about = Description(
        stage="halving",
        total_steps=1,
        num_steps=2,
        sampler="ddim",
        w_min=0.0,
        w_max=4.0,
        data_shape=(8, 8, 4),
        class_names=() if text else ("0", "1"),
        teacher=None,
        package_version="0",
        experiment=parse({"model": {"name": name, "options": NETWORKS[name]}}),
        condition_shapes={"text": (3, 8)} if text else {"label": ()},
        latent=True,
    )
    shapes = jax.eval_shape(about.network().init, jax.random.key(0))
    program = export_sampler(about, flatten_dict(shapes, sep="/"))
    assert str(program.out_avals[0].shape) == "(B, 8, 8, 4)"
