"""Studies: sweeps as lists of overrides, run point by point."""

import csv
import functools
import runpy
from pathlib import Path

import pytest
from etils import epath
from run_folder import rows_of

from guided_distill import cli, config
from guided_distill.errors import UserError
from guided_distill.evaluation import evaluate, reference
from guided_distill.evaluation.extractors import registry
from guided_distill.evaluation.results import write_results
from guided_distill.experiments import study
from guided_distill.experiments.sweeps import (
    ABLATIONS,
    name_of,
    product,
    values,
    with_overrides,
    zipped,
)

CONFIGS = Path(__file__).parents[1] / "configs"

SWEEPS = """
from guided_distill.config import default_config
from guided_distill.experiments.sweeps import values, zipped

base = runpy.run_path({digits!r})["get_config"]

def get_config(variant=""):
    config = base("runlocal")
    config.evaluation.update({{"weights": (1.0,), "teacher_num_steps": ()}})
    return config

def ends(config):
    samplers = values("halving.samplers", [("ddim",), ("stochastic",)])
    absent = values("data.name", ["npz:missing.npz"])
    return absent + zipped(samplers, values("guidance.w_embedding", ["fourier", "scalar"]))

def helper(config):
    return 3

def of_two(config, other):
    return values("halving.steps", [2, 3])

def twice(config):
    return values("halving.steps", [2, 2])

def misspelt(config):
    return values("halving.stepz", [2])
"""


def test_products_and_zips():
    one, other = values("a.x", [1, 2]), values("b.y", ["u", (0.5, 2.0)])
    assert product(one, other) == [
        {"a.x": 1, "b.y": "u"},
        {"a.x": 1, "b.y": (0.5, 2.0)},
        {"a.x": 2, "b.y": "u"},
        {"a.x": 2, "b.y": (0.5, 2.0)},
    ]
    assert zipped(one, other) == [{"a.x": 1, "b.y": "u"}, {"a.x": 2, "b.y": (0.5, 2.0)}]
    with pytest.raises(ValueError):
        zipped(one, other[:1])
    assert [name_of(point) for point in product(one, other)][1] == "a.x=1,b.y=0.5-2"
    assert name_of({"data.name": "npz:/tmp/a b.npz"}) == "data.name=npz__tmp_a_b.npz"


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("file", ["digits.py", "imagenet64.py"])
def test_every_ablation_fits_every_config(name, file):
    base = runpy.run_path(str(CONFIGS / file))["get_config"]()
    points = ABLATIONS[name](base)
    parsed = {name_of(point): config.parse(with_overrides(base, point)) for point in points}
    assert len(parsed) == len(points) > 1
    for key, value in points[-1].items():
        section, _, entry = key.rpartition(".")
        assert getattr(getattr(parsed[name_of(points[-1])], section), entry) == value
    assert config.parse(base) == config.parse(runpy.run_path(str(CONFIGS / file))["get_config"]())


@pytest.fixture(autouse=True)
def quick_measures(monkeypatch):
    """Evaluate with an extractor trained for one step, and a few images of the data."""
    extractor = functools.partial(registry.train_extractor, steps=1)
    monkeypatch.setattr(registry, "train_extractor", extractor)
    for module in (evaluate, reference):
        monkeypatch.setattr(module, "MAX_EXAMPLES", 64)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    file.write_text("import runpy\n" + SWEEPS.format(digits=str(CONFIGS / "digits.py")))
    return file


def sweep(file, name, workdir, *more):
    command = ["sweep", "--config", str(file), "--sweep", name, "--workdir", str(workdir)]
    return cli.main([*command, *more])


def checkpoints(workdir):
    return {path: path.stat().st_mtime_ns for path in workdir.glob("*/*/checkpoints/*/*")}


def test_a_study_resumes_in_shards_and_continues_after_a_failed_point(sweeps, tmp_path, capsys):
    assert sweep(sweeps, "ends", tmp_path, "--shard", "1/3") == 0
    ddim, stochastic = (
        f"halving.samplers={name},guidance.w_embedding={embedding}"
        for name, embedding in (("ddim", "fourier"), ("stochastic", "scalar"))
    )
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [ddim]
    alone = checkpoints(tmp_path)

    assert sweep(sweeps, "ends", tmp_path) == 2
    failed = "1 of 3 points failed: data.name=npz_missing.npz (no file missing.npz"
    assert failed in capsys.readouterr().err
    both = checkpoints(tmp_path)
    assert alone.items() < both.items()
    # Both points have the same teacher, which is trained once.
    assert (tmp_path / ddim / "teacher").exists()
    assert not (tmp_path / stochastic / "teacher").exists()

    assert sweep(sweeps, "ends", tmp_path) == 2
    assert checkpoints(tmp_path) == both
    with open(tmp_path / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    halving = [row for row in rows if row["stage"] == "halving"]
    students = {(row["point"], row["guidance.w_embedding"]) for row in halving}
    assert students == {(ddim, "fourier"), (stochastic, "scalar")}
    assert all(float(row["fd"]) > 0 for row in rows)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_has_the_rows_of_shards_that_end_while_it_is_written(tmp_path, monkeypatch):
    rows, write = rows_of(fd=1.0), study.write_text
    runs = [study.Run(name, {"seed": seed}, config.parse({})) for seed, name in enumerate("ab")]

    def overtaken(path, text):
        write_results(epath.Path(tmp_path) / "b" / "results.csv", rows)
        write(path, text)

    write_results(epath.Path(tmp_path) / "a" / "results.csv", rows)
    monkeypatch.setattr(study, "write_text", overtaken)
    results = study.write_table(epath.Path(tmp_path) / "sweep.csv", runs)
    assert results == {"a": rows, "b": rows}
    with open(tmp_path / "sweep.csv") as file:
        points = [row["point"] for row in csv.DictReader(file)]
    assert points == ["a"] * len(rows) + ["b"] * len(rows)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("ends", ["--shard", "2/2"], "--shard is '2/2'"),
        ("nothing", [], "neither a function that"),
        ("get_config", [], "neither a function that"),
        ("default_config", [], "neither a function that"),
        ("base", [], "neither a function that"),
        ("helper", [], "helper is not a sweep: it must return a list of points"),
        ("of_two", [], "of_two fails: TypeError"),
        ("twice", [], "two with the same name"),
        ("misspelt", [], "stepz"),
    ],
)
def test_bad_input(sweeps, tmp_path, capsys, name, more, said):
    assert sweep(sweeps, name, tmp_path, *more) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_value_of_another_type_is_refused():
    base = runpy.run_path(str(CONFIGS / "digits.py"))["get_config"]()
    with pytest.raises(UserError, match=r"halving\.steps=many"):
        with_overrides(base, {"halving.steps": "many"})
