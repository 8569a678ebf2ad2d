"""Shrunk config files run through train, evaluate and report.

test_pipeline.py does the same and more with configs/digits.py.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from guided_distill import cli
from guided_distill.evaluation import evaluate, reference
from guided_distill.evaluation.extractors import registry
from guided_distill.evaluation.results import read_results
from guided_distill.runs import folder as runs
from guided_distill.runs.trained import load_finished
from guided_distill.sampling.labels import cycling_labels, of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample
from guided_distill.stages import all_stages

FOLDER = Path(__file__).parents[1] / "configs"
RUNS = ("mixture2d.py:runlocal", "photo10.py:runlocal")
# U-Nets compile slowest: these stop after the first stage. test_paper_configs.py traces all.
UNETS = {
    "own_images.py:runlocal": {"model.options.channel_multipliers": (1,)},
    "cifar10_small.py:runlocal": {"model.options.channel_multipliers": (1,)},
    "fashion_mnist.py:runlocal": {"model.options.channel_multipliers": (1,)},
    "cifar10.py:runlocal": {"model.options.channel_multipliers": (1,)},
    "imagenet64.py:runlocal": {"model.options.channel_multipliers": (1,)},
    "sd15_laion512.py:runlocal": {},
    "sd21_laion768.py:runlocal": {},
    "sd_inpaint.py:runlocal": {},
    "ldm_imagenet256.py:runlocal": {},
    "dit_imagenet256.py:runlocal": {},
}


def test_no_config_file_is_left_out():
    files = {name.split(":")[0] for name in (*RUNS, *UNETS)} | {"digits.py"}
    # test_text_to_image.py runs emoji.py.
    assert files | {"emoji.py"} == {file.name for file in FOLDER.glob("*.py")}


@pytest.mark.parametrize("name", RUNS)
def test_config_runs_to_its_report(name, tmp_path, monkeypatch):
    # This test needs neither a trained extractor nor all images of the data.
    extractor = functools.partial(registry.train_extractor, steps=1)
    monkeypatch.setattr(registry, "train_extractor", extractor)
    for module in (evaluate, reference):
        monkeypatch.setattr(module, "MAX_EXAMPLES", 64)
    monkeypatch.chdir(tmp_path)
    workdir = epath.Path("run")
    where = ["--workdir", str(workdir)]
    assert cli.main(["train", "--config", f"{FOLDER / name}", *where]) == 0
    assert cli.main(["evaluate", *where]) == 0
    assert cli.main(["report", *where]) == 0

    experiment = runs.read_config(workdir)
    stages = all_stages(experiment)
    assert all((workdir / stage.name / "checkpoints").is_dir() for stage in stages)
    measured = {
        (each.stage, each.sampler, each.num_steps) for each in read_results(workdir / "results.csv")
    }
    for sampler in experiment.evaluation.teacher_samplers:
        assert ("teacher", sampler, 4) in measured
    for stage in stages:
        if stage.kind == "halving":
            assert ("halving", stage.sampler, stage.num_steps) in measured
    assert "<img" in (workdir / "report.html").read_text()


@pytest.mark.parametrize("name", UNETS)
def test_unet_config_trains_and_samples_its_teacher(name, tmp_path):
    changes = {"stage": "teacher", "teacher.steps": 2, "teacher.batch_size": 2, **UNETS[name]}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    where = ["--workdir", str(tmp_path)]
    assert cli.main(["train", "--config", f"{FOLDER / name}", *where, *overrides]) == 0
    trained = load_finished(epath.Path(tmp_path) / "teacher")
    labels = cycling_labels(2, len(trained.description.class_names))
    images = sample(
        trained,
        Request(condition=of_labels(labels), w=1.0, num_steps=2, sampler="ddim", batch_size=2),
    )
    assert images.shape == (2, 32, 32, 3)
    assert np.isfinite(images).all()
