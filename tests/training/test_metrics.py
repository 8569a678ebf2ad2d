"""The log of a stage, as JSON lines and as TensorBoard events."""

import json
import math

import numpy as np
import pytest
from etils import epath
from event_files import read_events
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import SessionLog

from guided_distill.errors import UserError
from guided_distill.training.metrics import MetricsLog, parameter_table
from guided_distill.training.record import read_metrics


@pytest.fixture
def directory(tmp_path):
    return epath.Path(tmp_path)


def events(directory):
    """Return the events of the newest file."""
    return read_events(
        max((directory / "tensorboard").iterdir(), key=lambda path: path.stat().mtime)
    )


def test_rows_after_the_restored_step_are_dropped(directory):
    log = MetricsLog(directory, step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step}, speed={})
    log.close()
    log = MetricsLog(directory, step=2)
    log.write(4, {"loss": 0.5}, speed={})
    log.close()
    assert read_metrics(directory) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 4, "loss": 0.5},
    ]


def test_a_figure_that_is_not_finite_is_null(directory):
    log = MetricsLog(directory, step=0)
    log.write(1, {"loss": math.nan, "norm": math.inf, "skipped": 1}, speed={})
    log.close()
    (line,) = (directory / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=pytest.fail)
    assert read == {"step": 1, "loss": None, "norm": None, "skipped": 1}
    assert [value.tag for value in events(directory)[-1].summary.value] == ["skipped"]


def test_events_are_on_disk_as_soon_as_they_are_written(directory):
    log = MetricsLog(directory, step=20)
    log.write(30, {"loss": 0.25, "norm": 2.0}, speed={})
    version, start, figures = events(directory)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (21, SessionLog.START)
    assert figures.step == 30
    assert {value.tag: value.simple_value for value in figures.summary.value} == {
        "loss": 0.25,
        "norm": 2.0,
    }
    assert all(event.wall_time > 1e9 for event in (version, start, figures))
    log.close()


def test_a_full_disk_is_reported(directory, monkeypatch):
    monkeypatch.setattr(
        "guided_distill.training.metrics.RecordWriter", lambda _: RecordWriter("/dev/full")
    )
    with pytest.raises(UserError, match=r"No space left.*make room"):
        MetricsLog(directory, step=0)


def test_a_folder_that_cannot_be_created_is_reported(directory):
    (directory / "tensorboard").write_text("")
    with pytest.raises(UserError, match="tensorboard can't be written"):
        MetricsLog(directory, step=0)


def test_the_table_of_parameters_counts_them():
    table = parameter_table({"layer": {"kernel": np.zeros((3, 40)), "bias": np.zeros(40)}})
    assert "layer/kernel" in table
    assert "(3, 40)" in table
    assert "Total: 160" in table


WHOLE = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


def test_a_truncated_log_is_read_up_to_its_last_whole_line(directory):
    directory.mkdir(parents=True, exist_ok=True)
    first = WHOLE.index(b"\n")
    for length in range(len(WHOLE) + 1):
        (directory / "metrics.jsonl").write_bytes(WHOLE[:length])
        count = (length >= first) + (length >= len(WHOLE) - 1)
        assert [row["step"] for row in read_metrics(directory)] == [1, 2][:count]


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"\x00\xff", b'{"loss": 1}', b"[]", b'{"step": "x"}', b"[" * 9999, b'{"step": true}'),
        *(
            b'{"step": 1, "loss": "x"}',
            b'{"step": 1, "loss": [1]}',
            b'{"step": 1%s}' % (b"0" * 400),
        ),
    ],
)
def test_a_damaged_line_is_named(directory, damaged):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_bytes(damaged + b"\n" + WHOLE)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1, is damaged: remove the line"):
        read_metrics(directory)
