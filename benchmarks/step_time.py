"""Time of an update, by stage, for a config on the present machine.

    python benchmarks/step_time.py configs/digits.py

Prints a line a stage: seconds to compile, milliseconds an update, examples a second. The compiled step
is the one that `guided-distill train` runs.
"""

import runpy
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from guided_distill.config import Experiment, parse
from guided_distill.data import sources
from guided_distill.stages import Stage, all_stages, compiled_step
from guided_distill.training.mesh import data_mesh
from guided_distill.training.state import initial_state
from guided_distill.training.trained import network_of

REPEATS = 5
WARM_UP = 10


def measure(experiment: Experiment, stage: Stage) -> tuple[float, float]:
    """Seconds of a stage's first call, compiling included, and of an update after it."""
    source = sources.load(experiment.data.name, image_size=experiment.data.image_size)
    network = network_of(experiment.model, source.shape, num_classes=source.num_classes)
    told_w = network.told_w()
    student = told_w if stage.takes_w else network
    teacher = told_w if stage.takes_w and stage.kind == "halving" else network
    step, optimizer = compiled_step(
        stage.kind,
        stage.settings,
        student=student,
        teacher=teacher,
        mesh=data_mesh(),
        total_steps=stage.total_steps,
        sampler=stage.sampler,
        w_range=(experiment.guidance.w_min, experiment.guidance.w_max),
    )
    key = jax.random.key(0)
    state = initial_state(jax.jit(student.init)(key), optimizer, ema_decay=stage.settings.ema_decay)
    frozen = {
        "params": jax.jit(teacher.init)(key),
        "num_steps": jnp.asarray(stage.num_steps or 0),
        "null": None,
    }
    size = (experiment.steps_per_dispatch, stage.settings.batch_size)
    batch = {
        "image": np.random.default_rng(0).normal(size=(*size, *source.shape)).astype(np.float32),
        "label": np.zeros(size, np.int32),
    }

    def seconds_of(calls: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(calls):
            state, _ = step(state, frozen, batch, key)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    first = seconds_of(1)
    # The first updates square gradients too small for float32, which a CPU is slow with.
    seconds_of(WARM_UP)
    return first, seconds_of(REPEATS) / REPEATS / experiment.steps_per_dispatch


def main() -> None:
    file, _, variant = sys.argv[1].partition(":")
    experiment = parse(runpy.run_path(file)["get_config"](variant))
    for stage in {stage.kind: stage for stage in reversed(all_stages(experiment))}.values():
        first, update = measure(experiment, stage)
        print(
            f"{stage.kind:10} first call {first:6.1f} s   update {1e3 * update:8.2f} ms   "
            f"{stage.settings.batch_size / update:9.0f} examples/s"
        )


if __name__ == "__main__":
    main()
