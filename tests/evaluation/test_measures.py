"""All measures of a stream of outputs, and their caveats."""

import errno
import itertools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from guided_distill.config import parse
from guided_distill.errors import UserError
from guided_distill.evaluation import outputs as outputs_module
from guided_distill.evaluation.evaluate import Table
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.measures import Yardstick, caveats, measure, shortages
from guided_distill.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from guided_distill.evaluation.metrics.kid import kernel_distance
from guided_distill.evaluation.metrics.precision_recall import Manifold, precision_recall
from guided_distill.evaluation.outputs import Outputs, row_outputs
from guided_distill.evaluation.reference import Reference
from guided_distill.evaluation.results import Row, read_results
from guided_distill.evaluation.tasks import Task
from guided_distill.stages import all_stages

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(90, 3))
SAMPLES = (RNG.normal(size=(80, 3)) + 0.5).astype(np.float32)
LABELS = np.arange(80) % 2


def extractor_of(*, own_classes=True):
    return Extractor(
        name="test",
        width=3,
        own_classes=own_classes,
        apply=lambda params, x: (x, jnp.stack([x[:, 0], -x[:, 0]], axis=1)),
        params=np.float32(0),
        batch_size=16,
    )


def reference_of(features=REAL):
    return Reference(FeatureStatistics.from_features(REAL), features, fingerprint="0123abcd")


def yardstick_of(reference, width=3):
    return Yardstick(replace(extractor_of(), width=width), reference)


def in_chunks(size, extractor):
    for start in range(0, len(SAMPLES), size):
        rows = slice(start, start + size)
        yield Outputs(*extractor(SAMPLES[rows]), LABELS[rows])


def test_a_stream_in_any_chunks_is_measured_as_the_whole():
    yardstick = yardstick_of(reference_of())
    found = measure(in_chunks(80, yardstick.extractor), yardstick, count=80)
    statistics = [FeatureStatistics.from_features(each) for each in (REAL, SAMPLES)]
    manifolds = [Manifold.from_features(each) for each in (REAL, SAMPLES)]
    assert found.n == 80
    assert found.fd == pytest.approx(frechet_distance(*statistics))
    assert found.kid == pytest.approx(kernel_distance(REAL, SAMPLES).mean)
    assert (found.precision, found.recall) == precision_recall(*manifolds)
    assert found.accuracy == np.mean((SAMPLES[:, 0] < 0) == LABELS)
    assert 1 < found.inception_score < 2
    for size in (7, 40):
        again = measure(in_chunks(size, yardstick.extractor), yardstick, count=80)
        assert again.fd == pytest.approx(found.fd)
        assert again.inception_score == pytest.approx(found.inception_score)
        assert (again.kid, again.recall, again.accuracy) == (
            pytest.approx(found.kid),
            found.recall,
            found.accuracy,
        )


def test_what_cannot_be_measured_is_none():
    extractor = extractor_of(own_classes=False)
    yardstick = Yardstick(extractor, reference_of(None))
    found = measure(in_chunks(30, extractor), yardstick, count=80)
    assert (found.kid, found.precision, found.recall, found.accuracy) == (None,) * 4
    assert found.fd > 0


@pytest.mark.parametrize(("count", "of_reference"), [(3, 90), (80, 3)])
def test_few_images_have_all_measures_but_precision_and_recall(count, of_reference):
    yardstick = yardstick_of(reference_of(REAL[:of_reference]))
    chunks = itertools.islice(in_chunks(count, yardstick.extractor), 1)
    found = measure(chunks, yardstick, count=count)
    assert (found.precision, found.recall) == (None, None)
    assert found.kid == pytest.approx(kernel_distance(REAL[:of_reference], SAMPLES[:count]).mean)
    assert found.fd > 0


def test_what_too_few_images_lack_is_reported_first():
    assert shortages(train=4, test=4) == []
    (none,) = shortages(train=4, test=1)
    assert "test split has 1 image: results.csv gets no row of real images" in none
    (few,) = shortages(train=4, test=3)
    assert "precision and recall need 4 and are left out of the row of real images" in few
    (few,) = shortages(train=3, test=4)
    assert few.startswith("the training split has 3 images: precision and recall need 4")
    with pytest.raises(
        UserError, match="the training split has 1 image: add more; an evaluation needs 2"
    ):
        shortages(train=1, test=4)


@pytest.mark.parametrize("count", [79, 81])
def test_another_number_of_samples_is_refused(count):
    yardstick = yardstick_of(reference_of())
    with pytest.raises(UserError, match=f"features of at least .* samples, but {count} samples to"):
        measure(in_chunks(30, yardstick.extractor), yardstick, count=count)


def test_parts_belong_to_one_row_only(tmp_path):
    experiment = parse({})
    stages = [stage for stage in all_stages(experiment) if stage.num_steps]
    task = Task(stages[0], "ddim", 4, 1.0)
    tables = [
        Table(epath.Path(tmp_path), yardstick_of(replace(reference_of(), **changes)), seed)
        for changes, seed in (({}, 0), ({}, 1), ({"fingerprint": "ffffffff"}, 0))
    ]
    folders = [table.parts(task, 80, "0123abcd") for table in tables]
    folders += [
        tables[0].parts(task, 30, "0123abcd"),
        tables[0].parts(task, 80, "ffffffff"),
        tables[0].parts(replace(task, w=1 + 1e-12), 80, "0123abcd"),
    ]
    assert len({str(folder) for folder in folders}) == len(folders)
    assert folders[0] == tables[0].parts(task, 80, "0123abcd")


def test_a_row_measured_again_replaces_the_old_one_whole_or_not_at_all(tmp_path, monkeypatch):
    yardstick, file = yardstick_of(reference_of()), epath.Path(tmp_path) / "results.csv"
    rows = [Row("halving", "ddim", 4, w) for w in (0.0, 1.0)]
    old = measure(in_chunks(80, yardstick.extractor), yardstick, count=80)
    for row in rows:
        Table(file.parent, yardstick, 0).add(row, old, checkpoint="0123abcd")
    before = file.read_bytes()
    assert not Table(file.parent, yardstick, 0).lacks(rows[0], 80, "0123abcd")
    table, new = Table(file.parent, yardstick, 0, again=True), replace(old, fd=7.0)
    assert table.lacks(rows[0], 80, "0123abcd")
    with monkeypatch.context() as patch:
        patch.setattr("guided_distill.storage.whole", full_disk)
        with pytest.raises(UserError, match=r"results\.csv can't be written"):
            table.add(rows[0], new, checkpoint="0123abcd")
    assert file.read_bytes() == before
    table.add(rows[0], new, checkpoint="0123abcd")
    assert {each.row: each.fd for each in read_results(file)} == {rows[0]: 7.0, rows[1]: old.fd}


def full_disk(path):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_caveats_are_those_that_apply():
    wide, wider = yardstick_of(reference_of(), 1280), yardstick_of(reference_of(), 2048)
    assert caveats(50_000, wider) == []
    (unnamed,) = caveats(50_000, yardstick_of(replace(reference_of(None), of="adm")))
    assert "statistics of adm don't say how they were made" in unnamed
    assert "TensorFlow graph" in unnamed
    (few,) = caveats(10_000, wide)
    assert "published" in few
    _, rank = caveats(1280, wide)
    assert "rank-deficient" in rank
    assert "unbiased" in rank


class Cut(Exception):
    pass


def drawing(drawn, *, batch, cut_at=None):
    """Return a function that draws SAMPLES, adds their indices to `drawn`, and raises Cut at `cut_at`."""

    def draw(start):
        while start < len(SAMPLES):
            if cut_at is not None and start >= cut_at:
                raise Cut
            drawn.extend(range(start, min(start + batch, len(SAMPLES))))
            yield SAMPLES[start : start + batch]
            start += batch

    return draw


def test_an_interrupted_row_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs_module, "SECONDS_BETWEEN_PARTS", 0.0)
    monkeypatch.setattr(outputs_module, "KEPT_SAMPLES", 15)
    # A clock that advances by a second at each call.
    monkeypatch.setattr(outputs_module.time, "perf_counter", itertools.count().__next__)
    places = {
        "parts": epath.Path(tmp_path) / "parts",
        "pictures": epath.Path(tmp_path) / "samples" / "row.npz",
    }
    drawn = []

    def row(**how):
        return row_outputs(drawing(drawn, **how), LABELS, extractor_of(), **places)

    for how in ({"batch": 10, "cut_at": 10}, {"batch": 10, "cut_at": 50}):
        with pytest.raises(Cut):
            list(row(**how))
    assert drawn == [*range(10), *range(50)], "the pictures' samples must be drawn again"
    outputs = list(row(batch=13))
    assert drawn[60:] == list(range(50, 80))
    assert sum(each.seconds for each in outputs) == 5 + 3, "of five draws that were kept, and three"
    np.testing.assert_array_equal(np.concatenate([each.features for each in outputs]), SAMPLES)
    np.testing.assert_array_equal(np.concatenate([each.labels for each in outputs]), LABELS)
    assert all(len(each.logits) == len(each.labels) for each in outputs)
    damaged = sorted(places["parts"].iterdir())[-1]
    damaged.write_bytes(damaged.read_bytes()[:-30])
    rows = list(row(batch=13))
    np.testing.assert_array_equal(np.concatenate([each.features for each in rows]), SAMPLES)
    with np.load(places["pictures"]) as pictures:
        np.testing.assert_array_equal(pictures["image"], SAMPLES[:15])
        np.testing.assert_array_equal(pictures["label"], LABELS[:15])
