"""Model cards: a run's own numbers and samples, and no other's."""

import dataclasses
import io
import re

import pytest
from PIL import Image
from run_folder import make_run, rows_of

from guided_distill.config import Experiment
from guided_distill.errors import UserError
from guided_distill.evaluation.results import write_results
from guided_distill.formats.card import Evidence, evidence_of, write_card
from guided_distill.runs.trained import Description


@pytest.fixture
def run(tmp_path):
    """A run whose teacher was also measured at four steps."""
    few = [dataclasses.replace(row, num_steps=4) for row in rows_of(fd=9.0)[:3]]
    return make_run(tmp_path / "run", results=[*few, *rows_of(fd=1.0)])


def about(**changes):
    plain = Description(
        stage="halving",
        total_steps=1000,
        num_steps=2,
        sampler="ddim",
        w_min=0.0,
        w_max=4.0,
        data_shape=(8, 8, 1),
        class_names=tuple("0123456789"),
        teacher=None,
        package_version="0.1.0",
        experiment=Experiment(),
    )
    return dataclasses.replace(plain, **changes)


def card(folder, evidence, *, models=None, file=None):
    models = models or [about()]
    values = {"models": models, "repository": "me/digits", "local": "digits", "file": file}
    write_card(folder, "own_card", evidence, about=models[-1], w=1.0, **values)
    text = (folder / "README.md").read_text()
    assert not re.search(r"\{[%{]|\n\n\n", text)
    return text


def test_a_students_card_has_its_rows_and_its_teachers(run):
    evidence = evidence_of([run / "halving_ddim_2"])
    titles = ["stage", "sampler", "steps", "w", "Fréchet distance", "class accuracy"]
    assert evidence.header == [*titles, "precision", "recall", "samples"]
    assert [row[:5] for row in evidence.rows] == [
        *(["teacher", "ddim", "16", w, fd] for w, fd in (("0", "1"), ("1", "2"), ("4", "5"))),
        *(["halving", "ddim", "2", w, fd] for w, fd in (("0", "1.5"), ("1", "2.5"), ("4", "5.5"))),
    ]
    assert evidence.caption == "Samples of halving_ddim_2, w = 1"
    # Ten images of 4x4 pixels, enlarged to 64x64, with gaps.
    assert Image.open(io.BytesIO(evidence.picture)).size == (10 * 64 + 9 * 8, 64)


def test_a_runs_card_has_the_rows_of_its_stages_and_the_last_ones_picture(run):
    names = ["teacher", "guidance", "halving_ddim_4", "halving_ddim_2", "halving_ddim_1"]
    evidence = evidence_of([run / name for name in names])
    assert len(evidence.rows) == 3 * 6
    assert evidence.caption == "Samples of halving_ddim_1, w = 1"


def test_rows_of_another_checkpoint_are_left_out(run):
    rows = [dataclasses.replace(row, checkpoint="0123abcd") for row in rows_of(fd=1.0)]
    write_results(run / "results.csv", rows)
    assert evidence_of([run / "halving_ddim_2"]) == Evidence()


def test_what_was_not_measured_or_drawn_is_not_in_the_card(run, tmp_path):
    (run / "samples").rmtree()
    evidence = evidence_of([run / "halving_ddim_2"])
    assert evidence.rows
    assert evidence.picture is None
    assert "samples.png" not in card(tmp_path, evidence)
    (run / "results.csv").unlink()
    nothing = evidence_of([run / "halving_ddim_2"])
    assert nothing == evidence_of([tmp_path / "x.safetensors"]) == Evidence()
    assert "Measured" not in card(tmp_path, nothing)
    assert not (tmp_path / "samples.png").exists()


def test_a_card_shows_the_table_and_the_picture(run, tmp_path):
    evidence = evidence_of([run / "halving_ddim_2"])
    text = card(tmp_path, evidence)
    assert "# digits, distilled to 2 steps" in text
    assert "    hf download me/digits --local-dir digits\n" in text
    assert "    guided-distill sample --workdir digits --w 1\n" in text
    assert "![Samples of halving_ddim_2, w = 1](samples.png)" in text
    assert (tmp_path / "samples.png").read_bytes() == evidence.picture
    table = text.partition("| stage | sampler |")[2].partition("\n\n")[0].splitlines()
    assert len(table) == 2 + 6
    assert {line.count("|") for line in table[1:]} == {10}


def test_a_model_file_and_an_encoder_have_their_own_commands(tmp_path):
    text = card(tmp_path, Evidence(), file="model.safetensors")
    assert "sample --workdir digits/model.safetensors --w 1\n" in text
    assert "guided-distill sample" not in card(
        tmp_path, Evidence(), models=[about(sampler="encode")]
    )
    both = card(
        tmp_path,
        Evidence(),
        models=[about(stage="teacher", sampler=None, num_steps=None, w_min=None), about()],
    )
    assert "# digits\n" in both
    assert "| teacher | any | any, with two calls per step |" in both


def test_damaged_samples_are_one_sentence(run):
    (run / "samples" / "halving_ddim_2_w1.npz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"halving_ddim_2_w1\.npz can't be read"):
        evidence_of([run / "halving_ddim_2"])
