"""The rows of results.csv as TensorBoard events."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from etils import epath
from event_files import read_events
from PIL import Image

from guided_distill.errors import UserError
from guided_distill.evaluation.events import log_rows
from guided_distill.evaluation.results import Result
from guided_distill.storage import npz_bytes

STUDENT = Result(
    stage="halving",
    sampler="ddim",
    num_steps=4,
    w=0.5,
    fd=1.25,
    kid=None,
    precision=0.5,
    recall=0.25,
    accuracy=None,
    n=8,
    seed=0,
    seconds=2.0,
    network_calls=4,
    extractor="lite0-64@other",
)
REAL = dataclasses.replace(
    STUDENT, stage="real", sampler=None, num_steps=None, w=None, n=50, seconds=None
)


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "samples").mkdir()
    samples = npz_bytes(image=np.zeros((9, 4, 4, 3), np.float32), label=np.arange(9))
    (tmp_path / "samples" / "halving_ddim_4_w0.5.npz").write_bytes(samples)
    return epath.Path(tmp_path)


def logged(workdir):
    """{group: {step: {tag: value}}} of all event files; an image is given as its size."""
    found = {}
    for folder in (workdir / "tensorboard").iterdir():
        for file in folder.iterdir():
            _, event = read_events(file)
            values = {
                each.tag: Image.open(io.BytesIO(each.image.encoded_image_string)).size
                if each.HasField("image")
                else each.simple_value
                for each in event.summary.value
            }
            assert event.step not in found.setdefault(folder.name, {}), "written twice"
            found[folder.name][event.step] = values
    return found


def test_a_row_is_written_once_with_its_measures_and_samples(workdir, monkeypatch):
    # Event files of the same second would have the same name.
    clock = itertools.count(1_000_000_000).__next__
    monkeypatch.setattr("guided_distill.training.metrics.time.time", clock)
    for results in ([REAL], [REAL, STUDENT], [REAL, STUDENT]):
        log_rows(workdir, results)
    assert logged(workdir) == {
        "lite0-64@other_n50_seed0": {
            0: {"fd/real": 1.25, "precision/real": 0.5, "recall/real": 0.25}
        },
        "lite0-64@other_n8_seed0": {
            4: {
                "fd/halving_ddim_w0.5": 1.25,
                "precision/halving_ddim_w0.5": 0.5,
                "recall/halving_ddim_w0.5": 0.25,
                "seconds_per_sample/halving_ddim_w0.5": 0.25,
                "samples/halving_ddim_w0.5": (8 * 64 + 7 * 8, 2 * 64 + 8),
            }
        },
    }


def test_samples_are_those_of_the_newest_row(workdir):
    log_rows(workdir, [STUDENT, dataclasses.replace(STUDENT, seed=1)])
    with_samples = {
        group: "samples/halving_ddim_w0.5" in steps[4] for group, steps in logged(workdir).items()
    }
    assert with_samples == {"lite0-64@other_n8_seed0": False, "lite0-64@other_n8_seed1": True}


def test_a_folder_that_cannot_be_created_is_reported(workdir):
    (workdir / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"tensorboard.* can't be written"):
        log_rows(workdir, [STUDENT])
