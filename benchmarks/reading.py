"""Count what a reader reads: the package's functions that run in three tasks, by file.

    python benchmarks/reading.py configs/mixture2d.py:runlocal

Trains the config in a temporary folder. Then prints, for one halving update from config to gradient, one
`sample` call and one evaluation: the number of files with functions that run, the number of lines of
these functions, and both for each room. Constants and types aren't counted, because nothing calls them.
"""

import collections
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import guided_distill
from guided_distill import config, pipeline
from guided_distill.data.outline import outline_of
from guided_distill.evaluation.evaluate import evaluate
from guided_distill.evaluation.tasks import Selection
from guided_distill.plan.programs import networks_of
from guided_distill.run_data import open_data
from guided_distill.stages import all_stages
from guided_distill.verbs.runs import read_config_file

PACKAGE = Path(guided_distill.__file__).parent


@contextlib.contextmanager
def counted(task: str) -> Iterator[None]:
    """Print the counts of the functions that are called in the context."""
    called: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            called.add(frame.f_code)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
    lines = collections.defaultdict(set)
    for code in called:
        file = Path(code.co_filename)
        if PACKAGE in file.parents and code.co_name != "<module>":
            numbers = [number for *_, number in code.co_lines() if number]
            lines[file.relative_to(PACKAGE)] |= set(range(min(numbers), max(numbers) + 1))
    rooms = collections.defaultdict(list)
    for file, numbers in lines.items():
        rooms[file.parts[0]].append(len(numbers))
    print(f"{task}: {len(lines)} files, {sum(map(len, lines.values()))} lines of functions")
    for room, each in sorted(rooms.items(), key=lambda item: -sum(item[1])):
        print(f"    {room}: {len(each)} files, {sum(each)} lines")


def gradient(values: Any) -> None:
    """Trace the gradient of the first halving round's loss."""
    experiment = config.parse(values)
    source = open_data(experiment)
    stage = next(stage for stage in all_stages(experiment) if stage.num_steps)
    student, teacher = networks_of(experiment, outline_of(source), stage)
    key = jax.random.key(0)
    batch = source.read(np.arange(1))
    loss = stage.loss(student, teacher)

    def of_params(params: Any, teachers: Any, keys: jax.Array) -> jax.Array:
        frozen = {"params": teachers, "num_steps": jnp.int32(stage.num_steps), "null": source.null}
        return loss(params, frozen, batch, keys).per_example.mean()

    weights = [jax.eval_shape(network.init, key) for network in (student, teacher)]
    jax.eval_shape(jax.grad(of_params), *weights, jax.random.split(key, 1))


def main() -> None:
    """Count the three tasks."""
    values = read_config_file(sys.argv[1], sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder) / "run"
        pipeline.run(config.parse(values), workdir)
        stage = all_stages(config.parse(values))[-1].name
        evaluate(workdir, Selection(stages=(stage,)))
        with counted("a halving update"):
            gradient(values)
        with counted("a sample"):
            guided_distill.load(workdir).sample(labels=[0])
        with counted("an evaluation"):
            evaluate(workdir, Selection(stages=(stage,), again=True))


if __name__ == "__main__":
    main()
