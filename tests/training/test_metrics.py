import json

import numpy as np
import pytest
from etils import epath

from guided_distill.training.metrics import MetricsLog, parameter_table, read_metrics


def write_log(directory, *, opened_at, steps):
    log = MetricsLog(epath.Path(directory), step=opened_at)
    for step in steps:
        log.write(step, {"loss": 1.0 / step, "skipped": step // 4})
    log.close()


def test_resumed_log_equals_an_uninterrupted_one(tmp_path):
    write_log(tmp_path / "whole", opened_at=0, steps=[2, 4, 6, 8])
    write_log(tmp_path / "cut", opened_at=0, steps=[2, 4, 6])
    write_log(tmp_path / "cut", opened_at=4, steps=[6, 8])
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert cut == whole


def test_what_was_logged_beyond_the_checkpoint_is_purged(tmp_path):
    write_log(tmp_path, opened_at=0, steps=[2, 4, 6, 8])
    write_log(tmp_path, opened_at=4, steps=[10])
    assert [row["step"] for row in read_metrics(epath.Path(tmp_path))] == [2, 4, 10]


def test_a_stage_that_starts_over_forgets_its_log(tmp_path):
    write_log(tmp_path, opened_at=0, steps=[2, 4])
    write_log(tmp_path, opened_at=0, steps=[2])
    assert [row["step"] for row in read_metrics(epath.Path(tmp_path))] == [2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_figures_that_are_not_finite_become_null(tmp_path, value):
    log = MetricsLog(epath.Path(tmp_path), step=0)
    log.write(1, {"loss": value, "skipped": 3})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "skipped": 3}


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(epath.Path(tmp_path), step=0)
    log.write(1, {"loss": 1.0})
    assert read_metrics(epath.Path(tmp_path)) == [{"step": 1, "loss": 1.0}]
    log.close()


def test_no_log_reads_as_no_rows(tmp_path):
    assert read_metrics(epath.Path(tmp_path)) == []


def test_parameter_table_names_and_counts_every_weight():
    params = {"first": {"kernel": np.zeros((40, 30)), "bias": np.zeros(30)}}
    table = parameter_table(params)
    for words in ("first/kernel", "first/bias", "(40, 30)", "1,200", "Total: 1,230"):
        assert words in table
