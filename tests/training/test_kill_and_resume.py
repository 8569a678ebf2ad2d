"""A run that is killed ten times, in saves and between them, ends as one that never was."""

import contextlib
import os
import random
import signal
import time

SAVING = "*/checkpoints/*-tmp"

# What must be new on disk before each kill; it then comes within this share of a whole run's time.
MOMENTS = [
    ("config.json", 0.08),
    *[("*/", 0.06), (SAVING, 0.002), ("*/checkpoints/?", 0.02)] * 2,
    *[("*/", 0.04), (SAVING, 0.002), (SAVING, 0.005)],
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
    began = time.monotonic()
    runs.start(tmp_path / "again")
    assert runs.end()[0] == 0
    seconds = time.monotonic() - began
    assert_same_runs(tmp_path / "again", undisturbed)

    workdir = tmp_path / "killed"
    generator = random.Random(0)
    cut_saves = [
        start_and_kill(runs, workdir, pattern, seconds * generator.uniform(0, longest))
        for pattern, longest in MOMENTS
    ]
    assert sum(cut_saves) >= 2
    assert sum(cut_saves) < 10
    runs.start(workdir)
    status, said = runs.end()
    assert status == 0, said
    assert "4/4" in said
    assert_same_runs(workdir, undisturbed)
    assert len(list(runs.cache.iterdir())) == compiled


def test_a_terminated_run_saves_says_so_and_goes_on(tmp_path, runs, undisturbed, assert_same_runs):
    for pattern in ("config.json", "guidance/checkpoints/2", "halving_ddim_2/checkpoints/2"):
        process = runs.start(tmp_path)
        while not list(tmp_path.glob(pattern)):
            time.sleep(0.001)
        began = time.monotonic()
        os.kill(process, signal.SIGTERM)
        status, said = runs.end()
        assert status == 75, said
        assert "the same command goes on" in said
        assert time.monotonic() - began < 10
    runs.start(tmp_path)
    status, said = runs.end()
    assert status == 0, said
    assert_same_runs(tmp_path, undisturbed)
