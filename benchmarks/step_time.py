"""Measure the time of an update of each stage of a config on this machine, and the wait for input in it.

    python benchmarks/step_time.py configs/digits.py

Prints one line per stage: seconds of the first call, which compiles; milliseconds per update; examples
per second; the share of the time in which the loop waits for the next batch. The compiled step and the
input pipeline are those of `guided-distill train`.
"""

import contextlib
import runpy
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill.config import Experiment, parse
from guided_distill.data.outline import outline_of
from guided_distill.data.pipeline import batches
from guided_distill.objectives.stage import Stage
from guided_distill.plan.programs import networks_of
from guided_distill.run_data import open_data
from guided_distill.stages import all_stages, compiled_step
from guided_distill.training.mesh import data_mesh
from guided_distill.training.state import split_initial_state

CALLS = 20
WARM_UP = 10


class Times(NamedTuple):
    """Seconds that a stage's first call takes, including compilation; that a later update takes; and that
    an update waits for input.
    """

    first: float
    update: float
    input: float


def measure(experiment: Experiment, stage: Stage) -> Times:
    """Measure a stage that trains on the config's data directly, not on latents made during the run."""
    source = open_data(experiment)
    student, teacher = networks_of(experiment, outline_of(source), stage)
    mesh = data_mesh()
    step, optimizer = compiled_step(stage, student=student, teacher=teacher, mesh=mesh)
    key = jax.random.key(0)
    state = split_initial_state(
        jax.jit(student.init)(key),
        optimizer=optimizer,
        ema_decay=stage.settings.ema_decay,
        mesh=mesh,
    )
    frozen = {
        "params": teacher.rounded(jax.jit(teacher.init)(key)),
        "num_steps": jnp.asarray(stage.num_steps or 0),
        "null": source.null,
    }
    iterator = batches(
        source, batch_size=stage.settings.batch_size, seed=0, flip=experiment.data.flip
    )

    def seconds_of(calls: int) -> tuple[float, float]:
        """Return the total seconds, and the seconds that the loop spends on getting batches."""
        nonlocal state
        start, waited, last = time.perf_counter(), 0.0, None
        for _ in range(calls):
            begun = time.perf_counter()
            taken = [next(iterator) for _ in range(experiment.steps_per_dispatch)]
            batch = {name: np.stack([each[name] for each in taken]) for name in taken[0]}
            waited += time.perf_counter() - begun
            state, report = step(state, frozen, batch, key)
            jax.block_until_ready(last)
            last = report
        jax.block_until_ready(state)
        return time.perf_counter() - start, waited

    with contextlib.closing(iterator):
        first, _ = seconds_of(1)
        # The first updates square tiny gradients into denormal numbers, which are slow on a CPU.
        seconds_of(WARM_UP)
        whole, waited = seconds_of(CALLS)
    updates = CALLS * experiment.steps_per_dispatch
    return Times(first, whole / updates, waited / updates)


def main() -> None:
    file, _, variant = sys.argv[1].partition(":")
    experiment = parse(runpy.run_path(file)["get_config"](variant))
    for stage in {stage.kind: stage for stage in reversed(all_stages(experiment))}.values():
        times = measure(experiment, stage)
        print(
            f"{stage.kind:10} first call {times.first:6.1f} s   update {1e3 * times.update:8.2f} ms   "
            f"{stage.settings.batch_size / times.update:9.0f} examples/s   "
            f"input {times.input / times.update:6.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
