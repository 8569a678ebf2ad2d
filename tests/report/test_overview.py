"""The verb runs: what is below a folder, how far it is, and what is broken."""

import dataclasses
import os
import socket
import subprocess
import sys

import pytest
from run_folder import make_run, rows_of

from guided_distill import cli
from guided_distill.report.overview import DEPTH, overview
from guided_distill.runs.files import write_stages
from guided_distill.storage import LOCK, LOST_AFTER

STAGES = {"teacher": 1000, "guidance": 1000, "halving_ddim_2": 2000, "halving_ddim_1": 2000}
UPDATES = sum(STAGES.values())


@pytest.fixture
def run(tmp_path):
    """A run of which the teacher is finished and stage one is at its 600th update."""
    config = {"halving": {"first_num_steps": 2}}
    workdir = make_run(tmp_path / "runs" / "one", results=rows_of(fd=1.0)[:3], config=config)
    write_stages(workdir, STAGES)
    for name in ("halving_ddim_2", "halving_ddim_1"):
        (workdir / name).rmtree()
    (workdir / "guidance" / "checkpoints" / "1000").rename(
        workdir / "guidance" / "checkpoints" / "500"
    )
    log(workdir, "guidance", '{"step": 500, "loss": 0.5}', '{"step": 600, "loss": 0.25}')
    return workdir


def log(workdir, stage, *lines):
    (workdir / stage / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def listed(folder, capsys):
    assert cli.main(["runs", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_run_is_as_far_as_its_files_say(run):
    found = overview(run)
    assert dict(found.totals) == STAGES
    assert found.done == {**dict.fromkeys(STAGES, 0), "teacher": 1000, "guidance": 600}
    assert found.left == ["guidance", "halving_ddim_2", "halving_ddim_1"]
    assert found.loss == 0.25
    assert (
        dataclasses.asdict(found.measured).items() < dataclasses.asdict(rows_of(fd=1.0)[2]).items()
    )
    assert 0 <= found.seconds < 60
    assert not found.training


def test_its_row_says_so(run, capsys):
    _, row = listed(run.parent, capsys)
    assert row.split("  ")[0] == "one"
    for words in (
        *("digits", "1/4", "stopped at guidance 600/1,000", f"1,600/{UPDATES:,}", "0.25"),
        "fd 5: teacher ddim N=16 w=4, n=64, classifier-64d",
    ):
        assert f" {words} " in row
    assert row.endswith("s ago")


@pytest.mark.parametrize(
    ("last", "shown"), [('{"step": 600, "loss": null}', 0.5), ('{"step": 600, "lo', 0.5)]
)
def test_the_loss_is_the_last_finite_one(run, last, shown):
    log(run, "guidance", '{"step": 500, "loss": 0.5}', last)
    assert overview(run).loss == shown


def test_a_checkpoint_counts_before_the_log_does(run):
    (run / "guidance" / "metrics.jsonl").unlink()
    assert overview(run).done["guidance"] == 500


def test_a_stage_whose_last_checkpoint_is_missing_is_not_finished(run):
    log(run, "guidance", '{"step": 1000, "loss": 0.5}')
    found = overview(run)
    assert found.done["guidance"] == 1000
    assert found.left[0] == "guidance"


@pytest.mark.parametrize(
    ("lock", "seconds", "trains"),
    [
        (f"{socket.gethostname()} {os.getppid()}\n", 0, True),
        (f"{socket.gethostname()} 999999999\n", 0, False),  # Killed.
        ("elsewhere 7\n", 0, True),
        ("elsewhere 7\n", LOST_AFTER + 60, False),
        ("", 0, False),
    ],
)
def test_a_run_trains_while_its_lock_lives(run, capsys, lock, seconds, trains):
    file = run / LOCK
    file.write_text(lock)
    then = os.stat(file).st_mtime - seconds
    os.utime(file, (then, then))
    assert overview(run).training is trains
    words = "training guidance" if trains else "stopped at guidance"
    assert words in listed(run.parent, capsys)[1]
    assert file.read_text() == lock


def test_a_finished_run_and_one_that_has_not_begun(tmp_path, capsys):
    done = make_run(tmp_path / "done", results=[])
    new = make_run(tmp_path / "new", results=[])
    for each in (new / name for name in overview(new).totals):
        each.rmtree()
    rows = listed(tmp_path, capsys)[1:]
    assert [row.split()[0] for row in rows] == ["done", "new"]
    assert " 5/5  finished " in rows[0]
    assert " 0/5  stopped at teacher 0/1,000 " in rows[1]
    assert not overview(done).left


def test_runs_of_earlier_versions_follow_from_their_configs(run):
    recorded = overview(run)
    (run / "stages.json").unlink()
    found = overview(run)
    assert (found.totals, found.left) == (recorded.totals, recorded.left)


def test_only_runs_are_listed_at_any_depth(run, capsys):
    deep = run.parent / "study" / "point" / "seed"
    make_run(deep, results=[])
    make_run(run.parent.joinpath(*"abcd"[: DEPTH + 1]), results=[])
    make_run(run.parent / ".trash", results=[])
    make_run(run / "samples" / "within", results=[])
    (run.parent / "vae").mkdir()
    (run.parent / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    names = [row.split()[0] for row in listed(run.parent, capsys)[1:]]
    assert names == ["one", "study/point/seed"]
    assert [row.split()[0] for row in listed(run, capsys)[1:]] == ["."]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[" * 100_000, "config.json is damaged"),
        ("config.json", None, "config.json is missing"),
        ("stages.json", "{}x", "stages.json is damaged"),
        ("stages.json", '{"teacher": -1}', "teacher has no number of updates"),
        ("results.csv", "stage\n1,2\n", "results.csv is damaged"),
        ("guidance/metrics.jsonl", "x\n{}\n", "metrics.jsonl, line 1, is damaged"),
    ],
)
def test_a_broken_run_is_one_line_beside_the_others(run, capsys, file, text, words):
    make_run(run.parent / "two", results=[])
    (run / file).unlink() if text is None else (run / file).write_text(text)
    _, whole, broken = listed(run.parent, capsys)
    assert whole.startswith("two ")
    assert broken.startswith("one: ")
    assert words in broken


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == f"guided-distill: {tmp_path / 'none'} is not a folder: give the folder that holds the runs"
    )
    assert listed(tmp_path, capsys) == [f"no runs below {tmp_path}"]


def test_the_table_needs_no_jax(run):
    program = f"""
import sys
from guided_distill.cli import main
assert main(["runs", {str(run.parent)!r}]) == 0
assert not {{"jax", "flax", "orbax", "tensorboardX"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stopped at guidance" in done.stdout
