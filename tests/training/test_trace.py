"""A trace of some updates."""

import gzip
import json
import os
import signal
import tempfile
from importlib import import_module
from pathlib import Path

import jax
import pytest
from etils import epath
from jax.profiler import ProfileData
from PIL import Image
from toy import source, train_toy

from guided_distill import cli
from guided_distill.data.pipeline import batches
from guided_distill.errors import Interrupted, UserError
from guided_distill.training.job import Monitoring

LOG = "metrics.jsonl"


def events(directory):
    """Return the events that Perfetto shows, by name."""
    (file,) = (directory / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    found = {}
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        found.setdefault(event.get("name"), []).append(event)
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    state, _ = train_toy(epath.Path(folder), data=source(with_nan=False))
    return state, (folder / LOG).read_text()


@pytest.mark.parametrize(("updates", "dispatches"), [(1, 1), (4, 2), (5, 3), (10, 5)])
def test_a_trace_holds_its_updates_and_changes_nothing(
    tmp_path, capfd, plain, assert_same_weights, updates, dispatches
):
    """Dispatches make two updates each, and the first one compiles."""
    state, _ = train_toy(
        epath.Path(tmp_path), data=source(with_nan=False), monitoring=Monitoring(profile=updates)
    )
    assert_same_weights(state, plain[0])
    assert (tmp_path / LOG).read_text() == plain[1]
    found = events(tmp_path)
    steps = [int(each["args"]["step_num"]) for each in found["train"]]
    assert steps == [2, 4, 6, 8, 10][:dispatches]
    assert len(found["input"]) == dispatches
    assert "compile" not in found
    line = f"the trace of updates 3 to {2 + 2 * dispatches} is in {tmp_path / 'profile'}"
    assert line in capfd.readouterr().err


def test_a_trace_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    picture = import_module("trace_picture")
    directory = epath.Path(tmp_path)
    train_toy(directory, data=source(with_nan=False), monitoring=Monitoring(profile=2))
    picture.draw(picture.read_events(directory), directory / "trace.png")
    with Image.open(tmp_path / "trace.png") as drawn:
        assert drawn.size == (1080, 360)


def test_tensorboard_finds_the_trace(tmp_path):
    """Its profiler reads plugins/profile/NAME/*.xplane.pb below the folder of the log."""
    train_toy(epath.Path(tmp_path), data=source(with_nan=False), monitoring=Monitoring(profile=4))
    (file,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    names = {
        event.name
        for plane in ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    }
    assert {"train", "input"} <= names


@pytest.mark.parametrize(("updates", "total", "remedy"), [(11, 12, "at most 10"), (1, 2, "leave")])
def test_more_updates_than_remain_are_refused(tmp_path, updates, total, remedy):
    with pytest.raises(UserError, match=rf"--profile is {updates}, but toy has .* left.*{remedy}"):
        train_toy(
            epath.Path(tmp_path),
            data=source(with_nan=False),
            total_steps=total,
            monitoring=Monitoring(profile=updates),
        )
    assert not (tmp_path / LOG).exists()


def test_a_preempted_trace_is_discarded(tmp_path, monkeypatch, plain, assert_same_weights):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    iterator = batches(source(with_nan=False), batch_size=8, seed=3)

    class Terminated:
        left, get_state, set_state = 5, iterator.get_state, iterator.set_state

        def __next__(self):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(iterator)

    with pytest.raises(Interrupted):
        train_toy(epath.Path(tmp_path / "run"), data=Terminated(), monitoring=Monitoring(profile=8))
    assert not (tmp_path / "run" / "profile").exists()
    assert not list((tmp_path / "temporary").iterdir())
    state, _ = train_toy(
        epath.Path(tmp_path / "run"), data=source(with_nan=False), monitoring=Monitoring(profile=2)
    )
    assert_same_weights(state, plain[0])
    assert [int(each["args"]["step_num"]) for each in events(tmp_path / "run")["train"]] == [8]


def test_the_command_traces_the_first_stage_that_it_trains(tiny_arguments, tmp_path, capsys):
    workdir = tmp_path / "run"
    command = ["train", *tiny_arguments, "--workdir", str(workdir), "--config.stage=teacher"]
    for updates, words in (("0", "make it at least 1"), ("x", "give a whole number")):
        assert cli.main([*command, "--profile", updates]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"guided-distill: --profile is {updates!r}".replace("'0'", "0"))
        assert words in line
    assert cli.main([*command, "--profile", "999"]) == 2
    assert "--profile is 999, but [1/4] teacher has" in capsys.readouterr().err
    assert cli.main([*command, "--profile", "1"]) == 0
    assert len(events(workdir / "teacher")["train"]) == 1
    assert cli.main([*command, "--profile", "1"]) == 2
    assert "no stage is left to train: leave it out" in capsys.readouterr().err
    # No session of the profiler is left open.
    with jax.profiler.trace(str(tmp_path / "other")):
        pass
