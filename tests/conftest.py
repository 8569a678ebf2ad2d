"""Strict numerics for every test, four simulated devices, and one finished run that tests share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh

from guided_distill import cli, pipeline
from guided_distill.config import Experiment, parse
from guided_distill.training.mesh import DATA_AXIS

jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("Agg")


@pytest.fixture(scope="session")
def tiny_arguments() -> list[str]:
    """The arguments that name the tiny config on the command line: every stage in seconds."""
    file = Path(__file__).parents[1] / "configs" / "digits.py"
    options = {"width": 16, "depth": 1, "embedding_width": 16}
    overrides = [f"--config.model.options.{name}={value}" for name, value in options.items()]
    return ["--config", f"{file}:runlocal", *overrides]


@pytest.fixture(scope="session")
def tiny_experiment(tiny_arguments: list[str]) -> Callable[..., Experiment]:
    """f("teacher.steps=8", ...): the tiny config with further overrides, parsed."""
    _, config, *options = tiny_arguments

    def experiment(*overrides: str) -> Experiment:
        given = [*options, *(f"--config.{override}" for override in overrides)]
        return parse(cli._read_config(config, given))

    return experiment


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_experiment: Callable[..., Experiment]
) -> epath.Path:
    """The workdir of a finished tiny run; copy it before changing anything."""
    workdir = epath.Path(tmp_path_factory.mktemp("tiny") / "run")
    pipeline.run(tiny_experiment(), workdir)
    return workdir


@pytest.fixture(scope="session")
def mesh_of() -> Callable[[int], Mesh]:
    """f(count): a mesh of the first `count` devices."""
    return lambda count: Mesh(np.array(jax.devices()[:count]), (DATA_AXIS,))


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[object, object], None]:
    """Fails unless two trees have the same structure and the same bits in every leaf."""

    def check(one: object, other: object) -> None:
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(left), np.asarray(right))

    return check


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[object]], tuple[int, str]]:
    """f(argv) -> (exit status, what the command wrote to stderr)."""

    def run(argv: Sequence[object]) -> tuple[int, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(each) for each in argv])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, capsys.readouterr().err

    return run
