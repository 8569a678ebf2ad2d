"""Studies: sweeps as lists of overrides, run point by point."""

import csv
import runpy
from pathlib import Path

import pytest

from guided_distill import cli, config
from guided_distill.errors import UserError
from guided_distill.sweeps import ABLATIONS, name_of, product, values, with_overrides, zipped

CONFIGS = Path(__file__).parents[1] / "configs"

SWEEPS = """
from guided_distill.sweeps import values, zipped

base = runpy.run_path({digits!r})["get_config"]

def get_config(variant=""):
    return base("runlocal")

def ends(config):
    samplers = values("halving.samplers", [("ddim",), ("stochastic",)])
    return zipped(samplers, values("halving.steps", [2, 3]))

def one_fails(config):
    return values("data.name", ["npz:missing.npz", "digits"])

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
    assert [name_of(point) for point in product(one, other)][1] == "x=1,y=0.5-2"
    assert name_of({"data.name": "npz:/tmp/a b.npz"}) == "name=npz__tmp_a_b.npz"


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


def test_shards_make_the_study_and_nothing_is_run_twice(sweeps, tmp_path, capsys):
    assert sweep(sweeps, "ends", tmp_path, "--shard", "1/2") == 0
    alone = checkpoints(tmp_path)
    assert {path.relative_to(tmp_path).parts[0] for path in alone} == {
        "samplers=stochastic,steps=3"
    }
    assert sweep(sweeps, "ends", tmp_path) == 0
    both = checkpoints(tmp_path)
    assert alone.items() <= both.items()
    assert sweep(sweeps, "ends", tmp_path) == 0
    assert checkpoints(tmp_path) == both
    with open(tmp_path / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["point"], row["halving.steps"]) for row in rows} == {
        ("samplers=ddim,steps=2", "2"),
        ("samplers=stochastic,steps=3", "3"),
    }
    assert all(float(row["fd"]) > 0 for row in rows)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_points_share_a_teacher(sweeps, tmp_path):
    assert sweep(sweeps, "ends", tmp_path) == 0
    first, second = tmp_path / "samplers=ddim,steps=2", tmp_path / "samplers=stochastic,steps=3"
    assert (first / "teacher").exists()
    assert not (second / "teacher").exists()
    assert (second / "guidance").exists()


def test_a_point_that_fails_stops_no_other(sweeps, tmp_path, capsys):
    assert sweep(sweeps, "one_fails", tmp_path) == 2
    assert "1 of 2 points failed: name=npz_missing.npz (missing.npz" in capsys.readouterr().err
    assert (tmp_path / "name=digits" / "results.csv").exists()


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("ends", ["--shard", "2/2"], "--shard is '2/2'"),
        ("nothing", [], "neither a function of"),
        ("get_config", [], "neither a function of"),
        ("twice", [], "two of one name"),
        ("misspelt", [], "stepz"),
    ],
)
def test_bad_input(sweeps, tmp_path, capsys, name, more, said):
    assert sweep(sweeps, name, tmp_path, *more) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_value_of_another_type_is_refused():
    base = runpy.run_path(str(CONFIGS / "digits.py"))["get_config"]()
    with pytest.raises(UserError, match="steps=many"):
        with_overrides(base, {"halving.steps": "many"})
