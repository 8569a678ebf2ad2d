"""Every config file, made small: trained to its last stage, evaluated and reported by the commands.

test_pipeline.py does the same, and more, with configs/digits.py.
"""

import functools
import runpy
from pathlib import Path

import pytest
from etils import epath

from guided_distill import cli, config, pipeline
from guided_distill.evaluation import evaluate
from guided_distill.evaluation.results import read_results

FOLDER = Path(__file__).parents[1] / "configs"
TINY = {"width": 16, "depth": 1, "embedding_width": 16}
TINY_UNET = {
    "width": 8,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "head_width": 8,
    "embedding_width": 16,
}
CONFIGS = {
    "mixture2d.py:runlocal": TINY,
    "photo10.py:runlocal": {**TINY, "patch_size": 8},
    "photo10.py:unet,runlocal": TINY_UNET,
}


def test_no_config_file_is_left_out():
    files = {name.split(":")[0] for name in CONFIGS} | {"digits.py"}
    assert files == {file.name for file in FOLDER.glob("*.py")}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs_to_its_report(name, tmp_path, monkeypatch):
    # The measure itself needs no training here, nor every image of the data.
    extractor = functools.partial(evaluate.train_extractor, steps=2)
    monkeypatch.setattr(evaluate, "train_extractor", extractor)
    monkeypatch.setattr(evaluate, "MAX_REFERENCE", 64)
    workdir = epath.Path(tmp_path / "run")
    options = [f"--config.model.options.{key}={value}" for key, value in CONFIGS[name].items()]
    assert (
        cli.main(["train", "--config", f"{FOLDER / name}", "--workdir", str(workdir), *options])
        == 0
    )
    assert cli.main(["evaluate", "--workdir", str(workdir)]) == 0
    assert cli.main(["report", "--workdir", str(workdir)]) == 0

    file, _, variant = name.partition(":")
    expected = config.parse(runpy.run_path(str(FOLDER / file))["get_config"](variant))
    experiment = pipeline.read_config(workdir)
    assert experiment.data == expected.data
    rounds = [(sampler, n) for sampler in experiment.halving.samplers for n in (2, 1)]
    folders = ["teacher", "guidance", *(f"halving_{sampler}_{n}" for sampler, n in rounds)]
    for folder in folders:
        assert (workdir / folder / "checkpoints").is_dir()
    teachers = [
        ("teacher", sampler, n) for sampler in expected.evaluation.teacher_samplers for n in (2, 4)
    ]
    students = [("halving", *each) for each in rounds]
    rows = [
        (*each, w) for each in [*teachers, ("guidance", "ddim", 4), *students] for w in (0.0, 1.0)
    ]
    results = read_results(workdir / "results.csv")
    found = [(each.stage, each.sampler, each.num_steps, each.w) for each in results]
    assert found == [("real", None, None, None), *rows]
    assert "<img" in (workdir / "report.html").read_text()
