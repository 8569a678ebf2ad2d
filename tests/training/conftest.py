"""Complete runs in separate processes, for tests that kill them or fill their disk."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etils import epath

from guided_distill.runs.trained import load_finished

# Forks after the imports but before JAX has a backend, so that a run starts at once.
FORK_RUNS = """
import functools, gc, json, os, sys
from guided_distill import cli, pipeline
from guided_distill.evaluation import evaluate
from guided_distill.evaluation.extractors import registry
from guided_distill.verbs import data, images, machine, models, pages, runs, studies

registry.train_extractor = functools.partial(registry.train_extractor, steps=20)
gc.disable()  # These runs are short.

for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        os.dup2(2, 1)
        cli.run(arguments)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Starts guided-distill with one config, one process at a time."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.cache = folder / "compiled"
        self._arguments = {
            "train": arguments,
            "evaluate": [
                *("--stages=teacher", "--num_steps=2", "--num_samples=8", "--w=1"),
                *("--cache", str(folder)),
            ],
        }
        self._log = folder / "stderr.txt"
        self._forks = subprocess.Popen(
            [sys.executable, "-c", FORK_RUNS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_COMPILATION_CACHE_DIR": str(self.cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            },
        )

    def start(self, workdir: Path, verb: str = "train") -> int:
        """Start a process and return its id."""
        command = [verb, *self._arguments[verb], "--workdir", str(workdir)]
        line = json.dumps([command, str(self._log)])
        print(line, file=self._forks.stdin, flush=True)
        return int(self._forks.stdout.readline())

    def end(self) -> tuple[int, str]:
        """Wait for the last started process, and return its exit status and stderr."""
        return int(self._forks.stdout.readline()), self._log.read_text()

    def close(self) -> None:
        with self._forks:
            self._forks.stdin.close()


@pytest.fixture(scope="session")
def runs(tiny_arguments, tmp_path_factory) -> Iterator[Runs]:
    runs = Runs(tiny_arguments, tmp_path_factory.mktemp("runs"))
    yield runs
    runs.close()


@pytest.fixture(scope="session")
def short_runs(tiny_arguments, tmp_path_factory) -> Iterator[Runs]:
    """Runs of a single stage, with six saves."""
    often = ["--config.stage=teacher", "--config.teacher.steps=12", "--config.checkpoint_every=2"]
    runs = Runs([*tiny_arguments, *often], tmp_path_factory.mktemp("short_runs"))
    yield runs
    runs.close()


@pytest.fixture(scope="session")
def undisturbed(runs, tmp_path_factory) -> Path:
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    runs.start(workdir)
    status, said = runs.end()
    assert status == 0, said
    return workdir


@pytest.fixture(scope="session")
def assert_same_runs(assert_same_weights) -> Callable[[Path, Path], None]:
    """f(one, other): fails unless all stages of two runs have the same final weights and logs."""

    def check(one: Path, other: Path) -> None:
        stages = [path.parent.name for path in other.glob("*/metrics.jsonl")]
        assert len(stages) == 4
        for stage in stages:
            ours, theirs = (load_finished(epath.Path(each) / stage).params for each in (one, other))
            assert_same_weights(ours, theirs)
            logs = [(each / stage / "metrics.jsonl").read_text() for each in (one, other)]
            assert logs[0] == logs[1]

    return check
