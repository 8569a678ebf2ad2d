"""A run killed again and again ends with the very bits of a run left in peace."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from guided_distill.training.trained import load_finished

STEPS = 12
SAVE_EVERY = 2
STAGES = ("teacher", "guidance", "halving_ddim_2", "halving_ddim_1")
KILLS = 10

# Imports take seconds, and every child needs them: one process makes them, and forks the children.
FORKER = """
import json, os, sys
from guided_distill import cli, pipeline
import sklearn.datasets

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(cli.main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def forker(cache):
    """Yields start(arguments) -> (process id, wait), where wait() -> the child's exit code."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    pipe = subprocess.PIPE
    command = [sys.executable, "-W", "ignore", "-c", FORKER]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as parent:

        def start(arguments):
            parent.stdin.write(json.dumps(arguments) + "\n")
            parent.stdin.flush()
            return int(parent.stdout.readline()), lambda: int(parent.stdout.readline())

        yield start


def wait_for_save(stage, step, *, begun):
    """Return when the save of `step` has begun, or is whole."""
    checkpoints = stage / "checkpoints"
    whole, part = checkpoints / str(step), f"{step}.orbax-checkpoint-tmp*"
    deadline = time.monotonic() + 120
    while not whole.exists() and not (begun and any(checkpoints.glob(part))):
        assert time.monotonic() < deadline, f"{whole} never came"
        time.sleep(0.001)


def test_a_run_killed_ten_times_ends_as_if_left_alone(
    tmp_path, tiny_arguments, assert_same_weights
):
    lengths = {"teacher.steps": STEPS, "guidance.steps": STEPS, "halving.steps": STEPS // 2}
    arguments = ["train", *tiny_arguments]
    arguments += [f"--config.{key}={value}" for key, value in lengths.items()]
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    rng = random.Random(0)
    saves = [(stage, step) for stage in STAGES for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)]
    # A stage's last save is followed by the way to the next stage, so two of those are always there.
    between_stages = {("teacher", STEPS), ("halving_ddim_2", STEPS)}
    others = [save for save in saves[:-1] if save not in between_stages]
    instants = sorted({*rng.sample(others, KILLS - 2), *between_stages}, key=saves.index)
    cut_saves = 0
    with forker(tmp_path / "cache") as start:
        _, wait = start([*arguments, "--workdir", str(alone)])
        assert wait() == 0
        for stage, step in instants:
            child, wait = start([*arguments, "--workdir", str(killed)])
            inside_save = (stage, step) not in between_stages and rng.random() < 0.6
            wait_for_save(killed / stage, step, begun=inside_save)
            time.sleep(rng.random() * (0.02 if inside_save else 0.5))
            os.kill(child, signal.SIGKILL)
            assert wait() == -signal.SIGKILL
            cut_saves += not (killed / stage / "checkpoints" / str(step)).exists()
        _, wait = start([*arguments, "--workdir", str(killed)])
        assert wait() == 0
    assert cut_saves > 0
    for stage in STAGES:
        one, other = (load_finished(epath.Path(run) / stage) for run in (alone, killed))
        assert one.step == other.step == STEPS
        assert_same_weights(one.params, other.params)
        logs = [(Path(run) / stage / "metrics.jsonl").read_text() for run in (alone, killed)]
        assert logs[0] == logs[1]
        assert [json.loads(line)["step"] for line in logs[0].splitlines()][-1] == STEPS
        assert not (killed / stage / "damaged").exists()
