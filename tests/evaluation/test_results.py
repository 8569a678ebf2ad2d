"""results.csv: writing, reading, and selecting comparable rows."""

import dataclasses

import numpy as np
import pytest
from etils import epath

from guided_distill.errors import UserError
from guided_distill.evaluation.comparison import at_weights, comparable, metric_name, shared_weights
from guided_distill.evaluation.metrics.registry import METRICS
from guided_distill.evaluation.results import (
    COLUMNS,
    Result,
    add_result,
    read_results,
    write_results,
)
from guided_distill.evaluation.tables import read_rows

RESULT = Result(
    stage="halving",
    sampler="ddim",
    num_steps=4,
    w=0.5,
    fd=1.25,
    kid=-0.5,
    precision=0.5,
    recall=0.25,
    accuracy=0.75,
    n=1024,
    seed=0,
    seconds=2.5,
    network_calls=4,
    extractor="classifier-64d",
    inception_score=3.5,
)


def row(**changes):
    return dataclasses.replace(RESULT, **changes)


def test_rows_are_read_as_written(tmp_path):
    empty = row(kid=None, precision=None, recall=None, accuracy=None, seconds=None)
    write_results(epath.Path(tmp_path / "results.csv"), [RESULT, empty])
    assert read_results(epath.Path(tmp_path / "results.csv")) == [RESULT, empty]


FIRST_COLUMNS = (
    "stage,sampler,num_steps,w,fd,kid,precision,recall,accuracy,n,seed,seconds,"
    "network_calls,extractor"
)


def test_a_file_of_the_first_version_is_read(tmp_path):
    file = epath.Path(tmp_path / "results.csv")
    file.write_text(
        f"{FIRST_COLUMNS}\nhalving,ddim,4,0.5,1.25,-0.5,0.5,0.25,0.75,1024,0,2.5,4,lite0\n"
    )
    assert read_results(file) == [row(extractor="lite0", inception_score=None)]


def test_a_row_begins_with_what_was_measured_and_holds_all_metrics():
    assert COLUMNS[:5] == ("stage", "sampler", "num_steps", "w", "fd")
    measured = {column.name for metric in METRICS for column in dataclasses.fields(metric)}
    assert measured < set(COLUMNS)
    assert {"fd", "kid", "precision", "inception_score", "caption_recall", "fd_teacher"} <= measured


@pytest.mark.parametrize("w", [1 / 3, 0.1 + 0.2, 1e-17, np.float64(2 / 3), 123456.789])
def test_a_row_is_known_by_the_weight_that_was_read(tmp_path, w):
    file = epath.Path(tmp_path / "results.csv")
    write_results(file, [row(w=w)])
    assert read_results(file)[0].key == row(w=w).key


def test_a_row_is_of_its_checkpoint_and_reference():
    whole = row(checkpoint="0123abcd", against="4567cdef")
    assert whole.made_of("0123abcd", "4567cdef")
    assert not whole.made_of("ffffffff", "4567cdef")
    assert not whole.made_of("0123abcd", "ffffffff")
    assert RESULT.made_of("0123abcd", "4567cdef"), "earlier versions didn't write them"
    assert not whole.made_of("0123abcd", "4567cdef", "89abcdef@256")
    compared = dataclasses.replace(whole, teacher="89abcdef@256")
    assert compared.made_of("0123abcd", "4567cdef", "89abcdef@256")
    assert not compared.made_of("0123abcd", "4567cdef", "89abcdef@64")
    assert compared.made_of("0123abcd", "4567cdef"), "a comparison that wasn't asked for may stay"


def test_a_row_replaces_the_older_one_and_no_others(tmp_path):
    file = epath.Path(tmp_path / "results.csv")
    old, other = row(checkpoint="0123abcd"), row(n=5, checkpoint="0123abcd")
    write_results(file, [old, other])
    new = row(checkpoint="ffffffff", fd=7.0)
    add_result(file, new)
    assert read_results(file) == [other, new]


WHOLE = "a,b\n1,x\n,y\n"


@dataclasses.dataclass
class Pair:
    a: int | None
    b: str


@pytest.mark.parametrize(
    "damaged",
    [b"", b"a,b\n1,x\n,", b"a,b\n1,x\n2", b"a,b\n1.5,x\n", b'a,b\n1,"x\n', b"a,b\n1,\xff\n"],
    ids=repr,
)
def test_a_damaged_file_is_reported_in_one_sentence(tmp_path, damaged):
    file = epath.Path(tmp_path / "rows.csv")
    file.write_text(WHOLE)
    assert read_rows(file, Pair) == [Pair(1, "x"), Pair(None, "y")]
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"rows\.csv is damaged \([^\n]*\): repair or remove it"):
        read_rows(file, Pair)


def test_a_file_that_does_not_know_the_seconds_is_read(tmp_path):
    file = epath.Path(tmp_path / "results.csv")
    write_results(file, [RESULT])
    place = COLUMNS.index("seconds")
    lines = [line.split(",") for line in file.read_text().splitlines()]
    file.write_text("\n".join(",".join(line[:place] + line[place + 1 :]) for line in lines) + "\n")
    (read,) = read_results(file)
    assert read == row(seconds=None)
    assert read.seconds_per_sample is None
    assert RESULT.seconds_per_sample == 2.5 / 1024


def test_means_are_over_the_weights_at_which_everything_was_measured():
    real = row(stage="real", sampler=None, num_steps=None, w=None)
    few = [row(w=0.0), row(w=1.0), row(w=2.0)]
    many = [row(w=w, num_steps=8) for w in (1.0, 2.0, 4.0)]
    results = [real, *few, *many]
    assert shared_weights(results) == {1.0, 2.0}
    assert at_weights(results, {1.0, 2.0}) == [real, *few[1:], *many[:2]]
    apart = [real, few[0], many[0]]
    assert shared_weights(apart) == set()
    assert at_weights(apart, set()) == apart
    assert shared_weights([real]) == set()


@pytest.mark.parametrize("field", ["extractor", "n", "seed", "w", "stage"])
def test_a_row_is_known_by(field):
    other = {"extractor": "lite0-64", "n": 5, "seed": 1, "w": 0.0, "stage": "teacher"}[field]
    assert row(**{field: other}).key != RESULT.key
    assert row(fd=7.0).key == RESULT.key


@pytest.mark.parametrize(
    ("extractor", "names"),
    [
        ("lite0-64", ("FD-Lite0", "KID-Lite0", "IS-Lite0")),
        ("lite0-224-0123abcd@cifar", ("FD-Lite0", "KID-Lite0", "IS-Lite0")),
        ("inception-6726825d", ("FID", "KID", "Inception Score")),
        ("classifier-64d", ("Fréchet distance", "kernel distance", "class score")),
        ("coordinates", ("Fréchet distance", "kernel distance", "class score")),
    ],
)
def test_metrics_are_called_by_their_names(extractor, names):
    columns = ("fd", "kid", "inception_score")
    assert tuple(metric_name(column, extractor) for column in columns) == names


def test_only_rows_of_one_extractor_and_number_of_samples_are_compared():
    few, many = row(extractor="lite0-64", n=300), row(extractor="lite0-64", n=9000)
    other_w = row(extractor="lite0-64", n=300, w=2.0)
    real = row(extractor="lite0-64", n=500, stage="real")
    results = [many, few, real, other_w, RESULT]
    assert comparable(results, "lite0") == [few, real, other_w]
    assert comparable(results[::-1], "lite0:some/file") == [other_w, real, few]
    assert comparable([many, few, RESULT], "lite0") == [many]
    assert comparable(results, "classifier") == [RESULT]
    assert comparable([few, other_w], "classifier") == [few, other_w]
    points = row(extractor="coordinates")
    assert comparable([points, many], "classifier") == [points]
    assert comparable([row(extractor="lite0-224", w=3.0), many], "lite0") == [many]
    assert comparable([], "classifier") == []


def test_rows_of_another_reference_are_not_compared():
    old, stale, new = row(w=0.0), row(w=1.0, against="0123abcd"), row(w=2.0, against="ffffffff")
    assert comparable([old, stale, new], "classifier") == [old, new]
    assert comparable([old, stale], "classifier") == [old, stale]


def test_a_row_of_an_unknown_stage_is_reported_in_one_sentence(tmp_path):
    path = epath.Path(tmp_path) / "results.csv"
    write_results(path, [dataclasses.replace(RESULT, stage="x")])
    with pytest.raises(UserError, match=r"results\.csv is damaged \(a row's stage is 'x'\)"):
        read_results(path)
