"""Only one process trains in a workdir at a time, and a dead process doesn't keep its lock."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from guided_distill import cli, storage
from guided_distill.errors import UserError
from guided_distill.storage import LOCK, LOST_AFTER, held

HERE = socket.gethostname()
HOLD = """
import sys, time
from etils import epath
from guided_distill.storage import held
with held(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "run"


@pytest.fixture(scope="module")
def dead():
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def owned(folder, host, process, *, age=0.0):
    folder.mkdir(parents=True)
    (folder / LOCK).write_text(f"{host} {process}\n")
    os.utime(folder / LOCK, (time.time() - age,) * 2)


def hold(folder):
    with held(folder):
        return (folder / LOCK).read_text()


OURS = f"{HERE} {os.getpid()}\n"


def test_the_lock_dies_with_its_process(folder):
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(
                UserError, match=rf"^process {holder.pid} on {HERE} is training in "
            ):
                hold(folder)
        finally:
            holder.send_signal(signal.SIGKILL)
    assert (folder / LOCK).read_text() == f"{HERE} {holder.pid}\n"
    assert hold(folder) == OURS


def test_the_lock_ends_with_the_block(folder):
    with pytest.raises(KeyboardInterrupt), held(folder):
        raise KeyboardInterrupt
    assert (folder / LOCK).read_text() == ""
    assert hold(folder) == hold(folder) == OURS


def test_a_second_process_is_refused(folder, tiny_arguments, capsys):
    with held(folder):
        assert cli.main(["train", *tiny_arguments, "--workdir", str(folder)]) == 2
        assert [path.name for path in folder.iterdir()] == [LOCK]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"guided-distill: process {os.getpid()} on {HERE} is training in {folder}: wait until it ends, "
        f"or choose another --workdir"
    )


def test_the_lock_of_another_machine_expires(folder):
    owned(folder, "elsewhere", 17, age=LOST_AFTER - 60)
    with pytest.raises(
        UserError, match=rf"^process 17 on elsewhere .*remove {folder}/\.lock, or .*10 m"
    ):
        hold(folder)
    os.utime(folder / LOCK, (time.time() - LOST_AFTER - 60,) * 2)
    assert hold(folder) == OURS


@pytest.mark.parametrize("text", [b"", b"elsewhere", b"elsewhere x\n", b"\xff\xfe 7\n7"])
def test_a_lock_file_that_names_no_process_locks_nothing(folder, text):
    folder.mkdir()
    (folder / LOCK).write_bytes(text)
    assert hold(folder) == OURS


def test_the_owner_touches_the_lock_file(folder, monkeypatch):
    monkeypatch.setattr(storage, "_BEAT", 0.01)
    with held(folder):
        os.utime(folder / LOCK, (0, 0))
        deadline = time.monotonic() + 20
        while os.stat(folder / LOCK).st_mtime < time.time() - 60:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("alive", [True, False])
def test_without_kernel_locks_the_process_is_looked_up(folder, monkeypatch, dead, alive):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    owned(folder, HERE, os.getppid() if alive else dead)
    if alive:
        with pytest.raises(UserError, match=f"^process {os.getppid()} on {HERE} is training"):
            hold(folder)
    else:
        assert hold(folder) == OURS
