"""A disk that fills up again and again: the error is one sentence, and nothing is lost."""

import shutil
import subprocess

import pytest
from etils import epath

from guided_distill.training.record import latest_step

# At these sizes, the disk fills up at parameters.txt, the first save, a later save, the last stage's
# save.
SIZES = ["4k", "16k", "24k", "100k", "600k", "2200k"]


def mount(folder, options):
    return subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def disk(tmp_path):
    if not shutil.which("mount"):
        pytest.skip("there is no `mount` to make a small disk with")
    if (tried := mount(tmp_path, "size=4k")).returncode:
        pytest.skip(f"mounting a small disk isn't permitted: {tried.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def steps(workdir):
    stages = ["teacher", "guidance", "halving_ddim_2", "halving_ddim_1"]
    return [latest_step(epath.Path(workdir) / stage) or 0 for stage in stages]


def test_a_full_disk_is_reported_and_loses_nothing(disk, runs, undisturbed, assert_same_runs):
    workdir = disk / "run"
    reached = steps(workdir)
    for size in SIZES:
        assert mount(disk, f"remount,size={size}").returncode == 0
        runs.start(workdir)
        status, said = runs.end()
        assert status == 2, said
        assert "Traceback" not in said
        (sentence,) = [line for line in said.splitlines() if line.startswith("guided-distill: ")]
        assert "make room" in sentence
        before, reached = reached, steps(workdir)
        assert all(now >= then for now, then in zip(reached, before, strict=True))
    assert reached[2] > 0
    assert mount(disk, "remount,size=16m").returncode == 0
    runs.start(workdir)
    status, said = runs.end()
    assert status == 0, said
    assert_same_runs(workdir, undisturbed)
