"""SIGTERM and Ctrl-C while the program is busy: in its imports, in C++, or in a save."""

import os
import signal
import subprocess
import sys
import time

import pytest

from guided_distill import cli, stopping

# A hash of a few minutes stands for a compilation: Python runs no other code until it is done.
BUSY = """
import hashlib, signal, sys, threading
from guided_distill import stopping

stopping.PATIENCE = 0.3
stopping.watch()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)  # As while Python runs no code.
if "unsaved" in sys.argv:
    stopping.unsaved.set()
    threading.Timer(3, stopping.unsaved.clear).start()
print("busy", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""

IMPORTS = "from guided_distill import cli; cli.run(['--version'])"


STARTED = []


@pytest.fixture(autouse=True)
def end_all():
    yield
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


def start(*arguments, folder=None):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder or ""), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    STARTED.append(process)
    return process


def busy(*arguments):
    process = start(BUSY, *arguments)
    assert process.stdout.readline() == "busy\n"
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_compilation_does_not_delay_the_end(number, status):
    process = busy()
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == status
    assert said == f"guided-distill: {stopping.STOPPED}\n"
    assert time.monotonic() - began < 10


def test_unsaved_updates_are_waited_for_and_this_is_reported():
    process = busy("unsaved")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 75
    waiting, stopped = said.splitlines()
    assert "saving after the current update or compilation, which can't be interrupted" in waiting
    assert stopped == f"guided-distill: {stopping.STOPPED}"


def test_a_second_interrupt_stops_at_once():
    process = busy("unsaved")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert (
        said
        == "guided-distill: stopped at once; the same command resumes from the last checkpoint\n"
    )


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_during_the_imports_ends_the_program(tmp_path, number, status):
    (tmp_path / "ml_collections.py").write_text(
        f"import os, signal\nos.kill(os.getpid(), signal.{number})\nraise SystemExit('went on')"
    )
    process = start(IMPORTS, folder=tmp_path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert said == f"guided-distill: {stopping.STOPPED}\n"


@pytest.mark.parametrize("words", ["saved at step 7", ""])
def test_the_command_line_reports_what_was_saved(monkeypatch, capsys, words):
    def interrupted(*_):
        raise KeyboardInterrupt(*[words] * bool(words))

    monkeypatch.setattr("guided_distill.verbs.machine._doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == f"guided-distill: {words or stopping.STOPPED}\n"
