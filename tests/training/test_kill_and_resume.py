"""A run that is killed ten times, during and between saves, ends like an undisturbed run."""

import contextlib
import csv
import os
import random
import shutil
import signal
import time

import pytest
from etils import epath

from guided_distill import cli
from guided_distill.runs.trained import load_finished
from guided_distill.training.record import latest_step

SAVING = "*/checkpoints/*-tmp"

# For each kill, the new files to wait for, and the longest delay after that, as a fraction of a run's
# time.
MOMENTS = [
    ("config.json", 0.08),
    *[("*/", 0.06), (SAVING, 0.002), ("*/checkpoints/?", 0.02)] * 2,
    *[("*/", 0.04), (SAVING, 0.002), (SAVING, 0.005)],
]


def seen(workdir, pattern):
    """Return the existing paths; a folder left by an earlier save is new if it is written again."""
    found = set()
    for path in workdir.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_mtime_ns if pattern == SAVING else 0))
    return found


def start_and_kill(runs, workdir, pattern, wait):
    """Start a run, kill it, and return whether that happened during a save."""
    before, saves_before = seen(workdir, pattern), seen(workdir, SAVING)
    process = runs.start(workdir)
    while os.path.exists(f"/proc/{process}") and seen(workdir, pattern) <= before:
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(process, signal.SIGKILL)
    assert runs.end()[0] == -signal.SIGKILL
    return not seen(workdir, SAVING) <= saves_before


def compiled_steps(runs):
    """Return the cached train steps; smaller programs are cached only if their compilation was slow."""
    return {file.name for file in runs.cache.glob("jit_many_updates*")}


def test_a_run_killed_ten_times_ends_like_an_undisturbed_one(
    tmp_path, runs, undisturbed, assert_same_runs
):
    assert len(MOMENTS) == 10
    compiled = compiled_steps(runs)
    assert compiled
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
    assert compiled_steps(runs) == compiled


def test_a_terminated_run_saves_and_resumes(tmp_path, runs, undisturbed, assert_same_runs):
    for pattern in ("config.json", "guidance/checkpoints/2", "halving_ddim_2/checkpoints/2"):
        process = runs.start(tmp_path)
        while not list(tmp_path.glob(pattern)):
            time.sleep(0.001)
        began = time.monotonic()
        os.kill(process, signal.SIGTERM)
        status, said = runs.end()
        assert status == 75, said
        assert "the same command resumes" in said
        assert time.monotonic() - began < 10
    runs.start(tmp_path)
    status, said = runs.end()
    assert status == 0, said
    assert_same_runs(tmp_path, undisturbed)


KILLS_OF_A_RUN = 12


def measured(workdir):
    """Return the rows of results.csv without durations and the checkpoint's time."""
    with (workdir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v for k, v in row.items() if "seconds" not in k and k != "checkpoint"} for row in rows
    ]


def live_through(runs, workdir, verb, kills, seconds, generator):
    """Run to the end with up to this many kills; return how many there were."""
    for count in range(kills):
        process = runs.start(workdir, verb)
        end = time.monotonic() + generator.uniform(0, seconds)
        while time.monotonic() < end and os.path.exists(f"/proc/{process}"):
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        status, said = runs.end()
        if status == 0:
            return count
        assert status == -signal.SIGKILL, said
        assert "damaged" not in said
    runs.start(workdir, verb)
    status, said = runs.end()
    assert status == 0, said
    return kills


def time_of(runs, workdir, verb):
    began = time.monotonic()
    runs.start(workdir, verb)
    status, said = runs.end()
    assert status == 0, said
    return time.monotonic() - began


def test_kills_at_random_instants_change_nothing(
    request, tmp_path, short_runs, assert_same_weights
):
    """Kills training and evaluation, and therefore also restores; see --kills."""
    whole = tmp_path / "whole"
    for verb in ("train", "evaluate"):
        time_of(short_runs, whole, verb)  # Compiles.
    seconds = {
        verb: time_of(short_runs, tmp_path / "timed", verb) for verb in ("train", "evaluate")
    }
    left, generator = request.config.getoption("--kills"), random.Random(os.getpid())
    while left > 0:
        workdir = tmp_path / f"killed{left}"
        for verb, longest in seconds.items():
            kills = min(left, KILLS_OF_A_RUN if verb == "train" else 2)
            left -= live_through(short_runs, workdir, verb, kills, longest, generator)
        stages = (load_finished(epath.Path(each) / "teacher") for each in (whole, workdir))
        assert_same_weights(*(each.params for each in stages))
        logs = [(each / "teacher" / "metrics.jsonl").read_text() for each in (whole, workdir)]
        assert logs[0] == logs[1]
        assert measured(workdir) == measured(whole)
        print(f"{left} kills left; a run takes {seconds}")
        shutil.rmtree(workdir)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["sample", "--stage", "teacher"],
            "4 is damaged (about/metadata is not as it was written)",
        ),
        (["train"], "teacher was finished, but all its checkpoints are damaged"),
    ],
    ids=lambda value: value[0],
)
def test_a_finished_stage_that_is_damaged_is_left_to_the_user(
    undisturbed, tiny_arguments, tmp_path, capsys, arguments, said
):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    for step in (2, 4):
        flip(workdir / "teacher" / "checkpoints" / str(step) / "about" / "metadata")
    shutil.rmtree(workdir / "guidance")
    before = files_of(workdir / "teacher")
    config = tiny_arguments if arguments == ["train"] else []
    assert cli.main([*arguments, *config, "--workdir", str(workdir)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("guided-distill: ")
    assert said in line
    assert files_of(workdir / "teacher") == before


def test_training_resumes_from_the_checkpoint_before(runs, undisturbed, tmp_path, assert_same_runs):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    stage = workdir / "halving_ddim_2"
    newest = str(latest_step(epath.Path(stage)))
    flip(stage / "checkpoints" / newest / "layout" / "metadata")
    shutil.rmtree(workdir / "halving_ddim_1")
    runs.start(workdir)
    status, said = runs.end()
    assert status == 0, said
    assert "layout/metadata is not as it was written" in said
    assert (stage / "damaged" / f"{newest}-0").exists()
    assert_same_runs(workdir, undisturbed)
