"""Which network makes the best teacher of a config's data in a given time on the present machine.

    python benchmarks/networks.py configs/digits.py 120

Each network trains for about that many seconds (compiling not counted) with the config's own teacher
settings, then is measured as `guided-distill evaluate` does it at the config's w, at 64 steps. Prints a
line a network: updates, weights, Frechet distance (mean over w), class accuracy.
"""

import runpy
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from guided_distill import pipeline
from guided_distill.config import Experiment, parse
from guided_distill.data import sources
from guided_distill.evaluation.evaluate import evaluate
from guided_distill.training.mesh import data_mesh
from guided_distill.training.state import initial_state
from guided_distill.training.trained import network_of

NETWORKS = {
    "mlp": {"width": 256, "depth": 4, "embedding_width": 128},
    "transformer": {
        "width": 96,
        "depth": 4,
        "num_heads": 4,
        "patch_size": 2,
        "embedding_width": 128,
    },
    "unet": {
        "width": 24,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (4,),
        "head_width": 24,
        "embedding_width": 128,
    },
}
REPEATS = 4
WARM_UP = 10


def main() -> None:
    path, seconds = sys.argv[1], float(sys.argv[2])
    file, _, variant = path.partition(":")
    for name, options in NETWORKS.items():
        config = runpy.run_path(file)["get_config"](variant)
        config.stage = "teacher"
        config.model.name = name
        with config.unlocked():
            config.model.options = options
        config.evaluation.teacher_num_steps = (64,)
        update, weights = time_of_update(parse(config))
        dispatch = config.steps_per_dispatch
        config.teacher.steps = max(1, round(seconds / update / dispatch)) * dispatch
        with tempfile.TemporaryDirectory() as folder:
            pipeline.run(parse(config), epath.Path(folder))
            rows = [row for row in evaluate(epath.Path(folder)) if row.stage == "teacher"]
        print(
            f"{name:12} {config.teacher.steps:6} updates of {1e3 * update:6.1f} ms  "
            f"{weights:9,} weights  FD {np.mean([row.fd for row in rows]):.3f}  "
            f"accuracy {np.mean([row.accuracy for row in rows]):.4f}",
            flush=True,
        )


def time_of_update(experiment: Experiment) -> tuple[float, int]:
    """Seconds of a teacher's update, and the number of its weights."""
    source = sources.load(experiment.data.name, image_size=experiment.data.image_size)
    network = network_of(experiment.model, source.shape, source.num_classes)
    step, optimizer = pipeline.compiled_step(
        "teacher",
        experiment.teacher,
        network,
        data_mesh(),
        total_steps=experiment.teacher.steps,
        sampler=None,
        w_range=(experiment.guidance.w_min, experiment.guidance.w_max),
    )
    key = jax.random.key(0)
    params = network.init(key)
    state = initial_state(params, optimizer, ema_decay=experiment.teacher.ema_decay)
    frozen = {"params": {}, "num_steps": jnp.zeros((), jnp.int32)}
    size = (experiment.steps_per_dispatch, experiment.teacher.batch_size)
    random = np.random.default_rng(0)
    batch = {
        "image": random.normal(size=(*size, *source.shape)).astype(np.float32),
        "label": np.zeros(size, np.int32),
    }
    # The first updates square gradients too small for float32, which a CPU is slow with.
    for _ in range(WARM_UP):
        state, _ = step(state, frozen, batch, key)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(REPEATS):
        state, _ = step(state, frozen, batch, key)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / REPEATS / experiment.steps_per_dispatch
    return seconds, sum(leaf.size for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
