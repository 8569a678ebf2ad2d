"""Measure the seconds from the start of `guided-distill train` to the end of its first update.

    python benchmarks/first_step.py configs/digits.py

Measures twice: with an empty compilation cache ("cold") and with the cache that the first run filled.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    (config,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "cached"):
            command = ["train", "--config", config, "--config.stage=teacher"]
            command += ["--config.teacher.steps=1", "--config.teacher.warmup_steps=0"]
            command += ["--config.steps_per_dispatch=1"]
            command += ["--cache", f"{folder}/cache", "--workdir", str(Path(folder, name))]
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "guided_distill.cli", *command], check=True)
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
