"""Runs of the tiny config with several processes that train together over loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LAUNCHER = Path(__file__).parents[2] / "launch" / "multiprocess.sh"
PROGRAM = [sys.executable, "-m", "guided_distill.cli"]


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


class Machine:
    """Starts processes with four devices each, which share a compilation cache."""

    def __init__(self, folder, arguments):
        self.train = ["train", *arguments]
        self._started = []
        self._environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }

    def launch(self, *arguments, options=(), program=PROGRAM):
        """Start two processes with launch/multiprocess.sh."""
        command = [str(LAUNCHER), "--processes", "2", "--grace", "5", *options, "--", *arguments]
        return self._popen(command, {"GUIDED_DISTILL": " ".join(program)})

    def process(self, index, *arguments, port, count=2):
        """Start one process of several, without the launcher."""
        variables = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        return self._popen([*PROGRAM, *arguments], variables)

    def _popen(self, command, variables):
        process = subprocess.Popen(
            command,
            env=self._environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def close(self):
        """Kill the processes that a failed test left behind."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(found, process, seconds=120):
    """Wait until found() is true. Fails if the process ends first."""
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def children(process):
    """Return the guided-distill processes that a launcher has started, by JAX_PROCESS_ID."""
    found = {}
    for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError
        ):  # The launcher's `sleep` may have ended.
            command = Path(f"/proc/{each}/cmdline").read_text()
            if "guided_distill.cli" not in command:
                continue
            variables = Path(f"/proc/{each}/environ").read_text().split("\0")
            values = dict(variable.split("=", 1) for variable in variables if "=" in variable)
            found[int(values["JAX_PROCESS_ID"])] = int(each)
    return found
