"""A run that is killed ten times, in saves and between them, ends as one that never was."""

import contextlib
import os
import random
import signal
import time

SAVING = "*/checkpoints/*-tmp"

# What must be new on disk before each kill; the kill then comes within so many seconds.
MOMENTS = [
    ("config.json", 1.5),
    *[("*/", 1.0), (SAVING, 0.03), ("*/checkpoints/?", 0.2)] * 2,
    *[("*/", 0.5), (SAVING, 0.03), (SAVING, 0.1)],
]


def seen(workdir, pattern):
    """What is there; a folder that an earlier save left is new when it is written to again."""
    found = set()
    for path in workdir.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_mtime_ns if pattern == SAVING else 0))
    return found


def start_and_kill(runs, workdir, pattern, wait):
    """Whether the kill fell into a save."""
    before, saves_before = seen(workdir, pattern), seen(workdir, SAVING)
    process = runs.start(workdir)
    while os.path.exists(f"/proc/{process}") and seen(workdir, pattern) <= before:
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(process, signal.SIGKILL)
    assert runs.end()[0] == -signal.SIGKILL
    return not seen(workdir, SAVING) <= saves_before


def test_a_run_killed_ten_times_ends_as_one_that_was_not(
    tmp_path, runs, undisturbed, assert_same_runs
):
    assert len(MOMENTS) == 10
    compiled = len(list(runs.cache.iterdir()))
    assert compiled > 0
    generator = random.Random(0)
    cut_saves = [
        start_and_kill(runs, tmp_path, pattern, generator.uniform(0, longest))
        for pattern, longest in MOMENTS
    ]
    assert sum(cut_saves) >= 2
    assert sum(cut_saves) < 10
    runs.start(tmp_path)
    status, said = runs.end()
    assert status == 0, said
    assert "4/4" in said
    assert_same_runs(tmp_path, undisturbed)
    assert len(list(runs.cache.iterdir())) == compiled
