"""Every benchmark runs to its end, on next to nothing."""

import re
import sys
from importlib import import_module
from pathlib import Path

import jax
import pytest
from etils import epath
from run_folder import ROW

from guided_distill.config import Model, parse
from guided_distill.models.outline import Outline
from guided_distill.runs.model_file import write_model_file
from guided_distill.runs.trained import Description, load_finished, network_of
from guided_distill.training.checkpoints import StageCheckpoints

ROOT = Path(__file__).parents[1]
DIGITS = f"{ROOT / 'configs' / 'digits.py'}:runlocal"


@pytest.fixture
def benchmark(monkeypatch, capfd):
    """f(name, *arguments, constant=value...): the lines that benchmarks/name.py prints."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    # Few updates are timed.
    step_time = import_module("step_time")
    monkeypatch.setattr(step_time, "CALLS", 2)
    monkeypatch.setattr(step_time, "WARM_UP", 1)

    def run(name, *arguments, **constants):
        module = import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capfd.readouterr()
        module.main()
        return capfd.readouterr().out.splitlines()

    return run


def test_step_time(benchmark):
    lines = benchmark("step_time", DIGITS)
    assert [line.split()[0] for line in lines] == ["halving", "guidance", "teacher"]
    for line in lines:
        assert re.search(r"update +\d+\.\d\d ms +\d+ examples/s +input +\d+\.\d%", line)


def test_first_step(benchmark):
    cold, cached = benchmark("first_step", DIGITS)
    assert re.fullmatch(r"cold: \d+\.\d s", cold)
    assert re.fullmatch(r"cached: \d+\.\d s", cached)


def test_networks(benchmark, monkeypatch):
    def evaluate(workdir):
        # Measuring takes longer than all else, and has tests of its own.
        assert load_finished(workdir / "teacher").description.total_steps == 1
        return [ROW]

    tiny = {"mlp": {"width": 8, "depth": 1, "embedding_width": 8}}
    (line,) = benchmark("networks", DIGITS, "0.000001", NETWORKS=tiny, evaluate=evaluate)
    assert re.fullmatch(r"mlp +1 updates of +\d+\.\d ms  FD 1\.000  accuracy 0\.7500", line)


def test_networks_that_are_compared_fit_digits(benchmark):
    for name, options in import_module("networks").NETWORKS.items():
        network = network_of(Model(name=name, options=options), Outline((8, 8, 1), 10))
        assert jax.eval_shape(network.init, jax.random.key(0))


def test_speedup(benchmark, tmp_path):
    workdir = epath.Path(tmp_path)
    options = {"width": 8, "depth": 1, "embedding_width": 8}
    experiment = parse({"model": {"name": "mlp", "options": options}})
    student = {"num_steps": 2, "sampler": "ddim", "w_min": 0.0, "w_max": 4.0}
    for stage, told in (("teacher", dict.fromkeys(student)), ("student", student)):
        about = Description(
            stage=stage,
            total_steps=1,
            **told,
            data_shape=(2,),
            class_names=("0", "1", "2"),
            teacher=None,
            package_version="0",
            experiment=experiment,
        )
        params = about.network().init(jax.random.key(0))
        with StageCheckpoints(workdir / stage) as checkpoints:
            checkpoints.save_result(1, params, about=about.to_json())
            checkpoints.wait()
    student_file = workdir / "student.safetensors"
    write_model_file(student_file, params, about=about.to_json(), dtype="float16")
    (line,) = benchmark("speedup", str(workdir / "teacher"), str(student_file), "16", COUNT=4)
    assert re.fullmatch(
        r"teacher .* s, student .* times faster, with 16 times fewer network calls", line
    )


def test_rounding(benchmark):
    tiny = {
        "width": 8,
        "channel_multipliers": (1,),
        "blocks_per_level": 1,
        "attention_resolutions": (),
        "head_width": 8,
        "embedding_width": 8,
    }
    lines = benchmark("rounding", "1", OPTIONS=tiny)
    assert [line.split()[1] for line in lines] == ["512", "256", "64", "8"]


def test_reading(benchmark):
    points = f"{ROOT / 'configs' / 'mixture2d.py'}:runlocal"
    short = ["--config.halving.samplers=('ddim',)", "--config.halving.first_num_steps=1"]
    lines = benchmark("reading", points, *short)
    counts = {}
    for task, line in re.findall(
        r"^(a halving update|a sample|an evaluation): (.*)$", "\n".join(lines), re.M
    ):
        counts[task] = [int(number) for number in re.findall(r"\d+", line)]
    assert list(counts) == ["a halving update", "a sample", "an evaluation"]
    (update, _), (_, _), (evaluation, _) = counts.values()
    assert 5 < update < evaluation
    # The functions of the halving loss are among those counted.
    assert re.search(r"objectives: [3-9] files", "\n".join(lines))
