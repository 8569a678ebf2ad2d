"""Compare networks as the teacher for a config's data, each trained for the same time on this machine.

    python benchmarks/networks.py configs/digits.py 120

Each network trains for about the given number of seconds (without compiling) with the config's teacher
settings, and is evaluated as by `guided-distill evaluate`, at the config's w and with 64 steps. Prints
one line per network: updates, Frechet distance (mean over w) and class accuracy.
"""

import runpy
import sys
import tempfile

import numpy as np
from etils import epath
from step_time import measure

from guided_distill import pipeline
from guided_distill.config import parse
from guided_distill.evaluation.evaluate import evaluate
from guided_distill.stages import all_stages

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
        experiment = parse(config)
        update = measure(experiment, all_stages(experiment)[0]).update
        dispatch = config.steps_per_dispatch
        config.teacher.steps = max(1, round(seconds / update / dispatch)) * dispatch
        with tempfile.TemporaryDirectory() as folder:
            pipeline.run(parse(config), epath.Path(folder))
            rows = [row for row in evaluate(epath.Path(folder)) if row.stage == "teacher"]
        print(
            f"{name:12} {config.teacher.steps:6} updates of {1e3 * update:6.1f} ms  "
            f"FD {np.mean([row.fd for row in rows]):.3f}  "
            f"accuracy {np.mean([row.accuracy for row in rows]):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
