"""SIGTERM at any moment of training: the state is saved, this is reported, and the result is the same."""

import os
import signal
import time

import pytest
from etils import epath
from toy import source, train_toy

from guided_distill import cli
from guided_distill.data.pipeline import batches
from guided_distill.errors import Interrupted
from guided_distill.training.checkpoints import StageCheckpoints
from guided_distill.training.preemption import stopping_at_once
from guided_distill.training.record import latest_step

LOG_EVERY = 4


class Terminated:
    """The batches of an iterator; the signal arrives while batch number `at` is read."""

    def __init__(self, iterator, at, number=signal.SIGTERM):
        self._iterator, self._left, self._number = iterator, at, number
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __iter__(self):
        return self

    def __next__(self):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), self._number)
        return next(self._iterator)


def train(directory, data):
    return train_toy(directory, data=data, log_every=LOG_EVERY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: state, input pipeline's state, and its log."""
    folder = tmp_path_factory.mktemp("whole")
    state, place = train(epath.Path(folder), source(with_nan=True))
    return state, place, (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("at", [1, 4, 7, 10, 12])
def test_a_terminated_run_ends_like_an_undisturbed_one(tmp_path, whole, assert_same_weights, at):
    directory, data = epath.Path(tmp_path), source(with_nan=True)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="the same command resumes"):
        train(directory, Terminated(batches(data, batch_size=8, seed=3), at))
    assert signal.getsignal(signal.SIGTERM) == before
    # Dispatches make two updates: the save comes at the end of the one in which the signal arrived.
    assert latest_step(directory) == at + at % 2
    state, place = train(directory, data)
    assert_same_weights(state, whole[0])
    assert place == whole[1]
    assert (tmp_path / "metrics.jsonl").read_text() == whole[2]


def test_an_interrupted_run_saves_as_well(tmp_path, whole, assert_same_weights):
    directory, data = epath.Path(tmp_path), source(with_nan=True)
    before = signal.getsignal(signal.SIGINT)
    for step in (4, 8):
        iterator = Terminated(batches(data, batch_size=8, seed=3), 3, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match=f"saved at step {step}; the same command"):
            train(directory, iterator)
        assert latest_step(directory) == step
    assert signal.getsignal(signal.SIGINT) == before
    state, _ = train(directory, data)
    assert_same_weights(state, whole[0])
    assert (tmp_path / "metrics.jsonl").read_text() == whole[2]


def test_two_preemptions_between_two_lines_of_the_log(tmp_path, whole):
    directory, data = epath.Path(tmp_path), source(with_nan=True)
    for _ in range(5):
        with pytest.raises(Interrupted):
            train(directory, Terminated(batches(data, batch_size=8, seed=3), 1))
    train(directory, data)
    assert (tmp_path / "metrics.jsonl").read_text() == whole[2]


def test_a_signal_in_the_last_save_ends_the_run_after_it(tmp_path, monkeypatch):
    wait = StageCheckpoints.wait

    def preempted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(StageCheckpoints, "wait", preempted)
    with pytest.raises(Interrupted, match="stopped"):
        train(epath.Path(tmp_path), source(with_nan=False))
    assert latest_step(epath.Path(tmp_path)) == 12


def test_outside_training_a_signal_stops_at_once():
    with pytest.raises(Interrupted, match="stopped"):
        end_oneself()


def end_oneself():
    with stopping_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")


class Dying:
    """An object whose __del__ is a callback of the interpreter, from which no exception propagates."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)


def end_oneself_in_a_callback():
    with stopping_at_once():
        Dying()
        time.sleep(5)


def test_a_signal_in_a_callback_is_neither_lost_nor_reported(capfd):
    with pytest.raises(Interrupted, match="stopped"):
        end_oneself_in_a_callback()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        (["sample"], "report.samples.sample_to_files"),
        (["evaluate"], "evaluation.evaluate.evaluate"),
        (["generate", "--prompt", "a"], "report.prompted.generate_to_files"),
    ],
)
def test_every_long_command_ends_with_the_status_for_a_restart(
    monkeypatch, capsys, tmp_path, arguments, work
):
    def preempted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    monkeypatch.setattr(f"guided_distill.{work}", preempted)
    cache = ["--cache", str(tmp_path)] if arguments == ["evaluate"] else []
    assert cli.main([*arguments, "--workdir", str(tmp_path), *cache]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert "the same command resumes" in line
