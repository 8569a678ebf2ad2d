"""Two processes on loopback train like one, even if one is killed or both are terminated."""

import functools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from machine import Machine, children, free_port, wait_for

from guided_distill import cli
from guided_distill.errors import Interrupted, UserError
from guided_distill.evaluation.extractors import registry
from guided_distill.evaluation.results import read_results
from guided_distill.runs.trained import load_finished
from guided_distill.training import processes
from guided_distill.training.record import latest_step

STEPS = 48

QUICK = """
import functools, sys
from guided_distill import cli
from guided_distill.evaluation.extractors import registry
registry.train_extractor = functools.partial(registry.train_extractor, steps=1)
cli.run(sys.argv[1:])
"""


ENDLESS = """
import os, pathlib, sys, time
from guided_distill import cli
from guided_distill.report import samples

def forever(workdir, *, out, **_):
    pathlib.Path(out, os.environ["JAX_PROCESS_ID"]).touch()
    while True:
        time.sleep(0.1)

samples.sample_to_files = forever
cli.run(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory, tiny_arguments):
    machine = Machine(tmp_path_factory.mktemp("machine"), tiny_arguments)
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def arguments(machine):
    return [
        *machine.train,
        "--config.stage=teacher",
        f"--config.teacher.steps={STEPS}",
        "--config.log_every=4",
        "--config.checkpoint_every=4",
    ]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory, eight_devices):
    """The workdir of an undisturbed run by one process with eight devices."""
    workdir = tmp_path_factory.mktemp("whole")
    assert cli.main([*arguments, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture(scope="module")
def disturbed(machine, arguments, tmp_path_factory):
    """A run in three parts: two processes, one of which is killed; two that are preempted; one process.

    The last part has half as many devices, and splits the weights over another number of them.
    """
    workdir = tmp_path_factory.mktemp("disturbed")
    command = [*arguments, "--workdir", str(workdir)]
    teacher = epath.Path(workdir) / "teacher"

    killed = machine.launch(*command, "--config.fsdp=8")
    wait_for(lambda: (latest_step(teacher) or 0) >= 4, killed)
    os.kill(children(killed)[1], signal.SIGKILL)
    output = killed.communicate(timeout=60)[0]
    # The other process may end first, because it lost the killed one.
    assert killed.returncode in (128 + signal.SIGKILL, 75), output
    if killed.returncode == 75:
        assert "[0] guided-distill: process 0 lost another process" in output
    reached = latest_step(teacher)
    assert reached < STEPS

    preempted = machine.launch(*command, "--config.fsdp=8")
    wait_for(lambda: latest_step(teacher) > reached, preempted)
    preempted.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output = preempted.communicate(timeout=60)[0]
    seconds = time.monotonic() - began
    assert preempted.returncode == 75, output
    saved = latest_step(teacher)
    assert reached < saved < STEPS
    assert output.count(f"preempted, and saved at step {saved}") == 2
    assert seconds < 10

    alone = machine.launch(*command, "--config.fsdp=2", options=("--processes", "1"))
    output = alone.communicate(timeout=100)[0]
    assert alone.returncode == 0, output
    return workdir


def test_a_killed_and_terminated_run_ends_like_an_undisturbed_one(whole, disturbed):
    expected, found = (load_finished(epath.Path(each) / "teacher") for each in (whole, disturbed))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        found.params,
        expected.params,
    )
    logs = [(each / "teacher" / "metrics.jsonl").read_text() for each in (whole, disturbed)]
    ours, theirs = ([json.loads(line) for line in log.splitlines()] for log in logs)
    assert [row["step"] for row in theirs] == [row["step"] for row in ours]
    np.testing.assert_allclose(
        [row["loss"] for row in theirs], [row["loss"] for row in ours], rtol=1e-5
    )


def test_two_processes_draw_the_samples_of_one(machine, whole, tmp_path):
    request = ["sample", "--workdir", str(whole), "--stage", "teacher", "--num", "5"]
    request += ["--num_steps", "3", "--seed", "7"]
    drawn = machine.launch(*request, "--out", str(tmp_path / "two"))
    assert cli.main([*request, "--out", str(tmp_path / "one")]) == 0
    output = drawn.communicate(timeout=100)[0]
    assert drawn.returncode == 0, output
    assert output.count(".npz") == 1
    one, two = (np.load(*(tmp_path / name).glob("*.npz")) for name in ("one", "two"))
    np.testing.assert_array_equal(one["label"], two["label"])
    np.testing.assert_allclose(one["image"], two["image"], atol=1e-5)


def test_two_processes_measure_what_one_does(machine, whole, tmp_path, monkeypatch):
    # The feature extractor needs no training here.
    quick = functools.partial(registry.train_extractor, steps=1)
    monkeypatch.setattr(registry, "train_extractor", quick)
    program = tmp_path / "quick.py"
    program.write_text(QUICK)
    one, two = tmp_path / "one", tmp_path / "two"
    request = ["evaluate", "--num_samples", "20", "--num_steps", "2", "--w", "1"]
    shutil.copytree(whole, one)
    assert cli.main([*request, "--workdir", str(one)]) == 0
    measured = ("*.csv", "reference", "samples", "tensorboard")
    shutil.copytree(one, two, ignore=shutil.ignore_patterns(*measured))
    command = [sys.executable, str(program)]
    together = machine.launch(*request, "--workdir", str(two), program=command)
    output = together.communicate(timeout=200)[0]
    assert together.returncode == 0, output
    assert output.count("results.csv") == 1
    rows = [read_results(epath.Path(each) / "results.csv") for each in (one, two)]
    assert [row.key for row in rows[0]] == [row.key for row in rows[1]]
    for ours, theirs in zip(*rows, strict=True):
        for name in ("fd", "kid", "precision", "recall", "accuracy"):
            np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=1e-3)
    files = [{str(path.relative_to(each)) for path in each.rglob("*.npz")} for each in (one, two)]
    assert files[0] == files[1]
    assert len(list(two.glob("tensorboard/*/*"))) == len(rows[1])


def test_processes_that_do_not_train_stop_at_once(machine, tmp_path):
    program = tmp_path / "endless.py"
    program.write_text(ENDLESS)
    begun = [tmp_path / str(index) for index in range(2)]
    drawing = machine.launch(
        *("sample", "--workdir", str(tmp_path), "--out", str(tmp_path)),
        program=[sys.executable, str(program)],
    )
    wait_for(lambda: all(each.exists() for each in begun), drawing)
    began = time.monotonic()
    drawing.send_signal(signal.SIGTERM)
    output = drawing.communicate(timeout=60)[0]
    assert drawing.returncode == 75, output
    assert output.count("guided-distill: stopped; the same command resumes") == 2
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("verb", "flag", "value", "said"),
    [
        ("sample", "--w", "2", "--w is 2.0 in process 1 and not given in process 0"),
        ("sample", "--num", "3", "--num is 3 in process 1 and 64 in process 0"),
        (
            "evaluate",
            "--num_steps",
            "4",
            "--num_steps is 4 in process 1 and not given in process 0",
        ),
        ("evaluate", "--workdir", "there", "--workdir is there in process 1"),
        ("train", "--workdir", "there", "--workdir is there in process 1"),
    ],
)
def test_another_flag_is_refused(
    tmp_path, monkeypatch, capsys, tiny_arguments, verb, flag, value, said
):
    texts = []

    def of_both(text):
        texts.append(text)
        return texts

    # Simulates two processes in turn; the first sees only itself, and ends because there is no run.
    monkeypatch.setattr(processes, "texts_of_all", of_both)
    config = [*tiny_arguments, "--config.seed=x"] if verb == "train" else []
    command = [verb, *config, "--workdir", str(tmp_path)]
    assert cli.main(command) == 2
    del texts[1:]
    capsys.readouterr()
    assert cli.main([*command, flag, value]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--workdir=elsewhere", "--workdir is elsewhere in process 1 and /"),
        ("--config.seed=1", "config.seed is 1 in process 1 and 0 in process 0"),
        ("--config.teacher.steps=x", "config.teacher.steps"),
    ],
)
def test_another_config_is_refused_by_all(machine, tmp_path, override, said):
    command, port = [*machine.train, "--workdir", str(tmp_path)], free_port()
    first = machine.process(0, *command, port=port)
    other = machine.process(1, *command, override, port=port)
    for process in (first, other):
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 2, output
        assert said in output
        assert "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_the_wait_for_missing_processes_times_out(machine, tmp_path):
    ports = free_port(), free_port()
    alone = [
        machine.process(
            index, *machine.train, "--workdir", str(tmp_path), "--start_timeout", "3", port=port
        )
        for index, port in enumerate(ports)
    ]
    for process, port in zip(alone, ports, strict=True):
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 2, output
        assert output.startswith("guided-distill: ")
        assert len(output.splitlines()) == 1
        assert f"127.0.0.1:{port} within 3 s" in output


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "2"},
        {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
        {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "a", "JAX_PROCESS_ID": "0"},
    ],
    ids=str,
)
def test_inconsistent_variables_are_named(arguments, tmp_path, monkeypatch, capsys, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*arguments, "--workdir", str(tmp_path)]) == 2
    assert "JAX_PROCESS_ID" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["here", ":1", "here:", "here:abc", "here:0", "here:65536"])
def test_an_address_without_a_port_is_named(tmp_path, monkeypatch, capsys, address):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    assert cli.main(["sample", "--workdir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"JAX_COORDINATOR_ADDRESS is {address}; give host:port" in line


@pytest.mark.parametrize("interface", ["127.0.0.1", ""])
def test_a_port_that_is_taken_is_named(tmp_path, monkeypatch, capsys, interface):
    with socket.create_server((interface, 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        assert cli.main(["sample", "--workdir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"process 0 can't listen on port {port} (" in line
    assert "choose another one in JAX_COORDINATOR_ADDRESS" in line


@pytest.mark.parametrize("seconds", ["0", "-5"])
def test_a_timeout_of_zero_is_refused(tmp_path, capsys, seconds):
    assert cli.main(["sample", "--workdir", str(tmp_path), "--start_timeout", seconds]) == 2
    assert f"--start_timeout is {seconds}; make it at least 1" in capsys.readouterr().err


def work_together(error):
    with processes.together():
        if error:
            raise error


@pytest.mark.parametrize("kind", [UserError, Interrupted])
def test_an_error_in_one_process_is_raised_in_all(monkeypatch, kind):
    texts = []

    def of_both(text):
        texts.append(text)
        return texts

    monkeypatch.setattr(processes, "texts_of_all", of_both)
    for error in (kind("said so"), None):
        with pytest.raises(kind, match=r"^said so$"):
            work_together(error)


def test_a_batch_that_devices_cannot_share_is_named(arguments, tmp_path, capsys, eight_devices):
    for size, accumulation, multiple in ((6, 1, 8), (8, 2, 16)):
        overrides = [
            f"--config.teacher.batch_size={size}",
            f"--config.teacher.accumulation={accumulation}",
        ]
        assert cli.main([*arguments, "--workdir", str(tmp_path), *overrides]) == 2
        said = capsys.readouterr().err
        assert f"config.teacher.batch_size is {size}" in said
        assert f"multiple of {multiple}" in said
    assert not list(tmp_path.iterdir())


def test_kills_at_random_instants_change_nothing(
    request, machine, arguments, tmp_path, assert_same_weights
):
    """Kills one of two processes, or both; a tenth of --kills times, so never by default."""
    left = request.config.getoption("--kills") // 10
    if not left:
        pytest.skip("--kills 10 kills two processes once")
    command = [*arguments, "--workdir"]
    undisturbed = machine.launch(*command, str(tmp_path / "whole"))
    output = undisturbed.communicate(timeout=600)[0]
    assert undisturbed.returncode == 0, output
    generator, workdir = random.Random(os.getpid()), tmp_path / "killed"
    teacher = epath.Path(workdir) / "teacher"
    ended = 0
    while left:
        killed = machine.launch(*command, str(workdir))
        goal = (latest_step(teacher) or 0) + 4 * generator.randrange(4)
        while (latest_step(teacher) or 0) < goal and killed.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 2))
        try:
            victims = generator.choice([(0,), (1,), (0, 1)])
            for each in victims:
                os.kill(children(killed)[each], signal.SIGKILL)
        except (KeyError, FileNotFoundError, ProcessLookupError):
            victims = ()
        output = killed.communicate(timeout=600)[0]
        if victims:
            left -= 1
            assert killed.returncode in (128 + signal.SIGKILL, 75), output
            assert "damaged" not in output
            print(f"{left} left, at step {latest_step(teacher)}")
        if not victims or not left:
            last = machine.launch(*command, str(workdir))
            output = last.communicate(timeout=600)[0]
            assert last.returncode == 0, output
            stages = (
                load_finished(epath.Path(tmp_path) / name / "teacher")
                for name in ("whole", "killed")
            )
            assert_same_weights(*(each.params for each in stages))
            logs = [
                (tmp_path / name / "teacher" / "metrics.jsonl").read_text()
                for name in ("whole", "killed")
            ]
            assert logs[0] == logs[1]
            ended += 1
            shutil.rmtree(workdir)
    print(f"{ended} runs ended the same")
