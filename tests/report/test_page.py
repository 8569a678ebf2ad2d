"""The page of a run: its sections, and its notice of anything that failed or is missing."""

import dataclasses
import html
import io
import os
import re

import numpy as np
import pytest
from run_folder import ROW, WEIGHTS, make_run, rows_of

from guided_distill.config import Data
from guided_distill.errors import UserError
from guided_distill.evaluation.results import read_results
from guided_distill.report import grids
from guided_distill.report import page as page_module
from guided_distill.report.figures import loss_figure
from guided_distill.report.grids import pair
from guided_distill.report.page import headline, tiles, timed, write_report
from guided_distill.report.shortfalls import shortfalls
from guided_distill.runs.folder import read_config
from guided_distill.stages import all_stages
from guided_distill.training.record import read_metrics


def written(workdir):
    return html.unescape(write_report(workdir).read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(make_run(tmp_path_factory.mktemp("run"), results=rows_of(fd=1.0)))


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("npz:/home/me/shapes.npz", "shapes.npz"),
        ("folder:/home/me/photos/", "photos"),
        ("parquet:/home/me/train.parquet", "train.parquet"),
        ("tfds:cifar10", "tfds:cifar10"),
        ("digits", "digits"),
    ],
)
def test_pages_name_data_without_their_place(name, title):
    assert Data(name).title == title


def test_a_page_is_called_by_the_datas_name(tmp_path):
    config = {"data": {"name": "npz:/home/me/shapes.npz"}}
    page = written(make_run(tmp_path / "run", results=rows_of(fd=1.0), config=config))
    assert "<title>guided_distill: shapes.npz</title>" in page
    assert "Data: shapes.npz." in page


def test_damaged_samples_are_reported_in_one_sentence(tmp_path):
    workdir = make_run(tmp_path / "run", results=rows_of(fd=1.0))
    file = sorted((workdir / "samples").glob("halving_ddim_4_w*.npz"))[0]
    whole = file.read_bytes()
    for damaged in (b"", whole[:-30], b"no archive"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"^{file} can't be read \([^\n]*\): remove it$"):
            write_report(workdir)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("halving_ddim_4_w0.npz", {"label": None}),
        ("halving_ddim_4_w0.npz", {"image": np.full((10, 4, 4, 1), "x")}),
        ("halving_ddim_4_w0.npz", {"image": np.zeros((10, 4, 4, 2))}),
        ("halving_ddim_4_w0.npz", {"image": np.float32(0)}),
        ("halving_ddim_4_w0.npz", {"label": np.arange(9)}),
        ("teacher_ddim_16_w1_path.npz", {"t": np.float64(0)}),
        ("teacher_ddim_16_w1_path.npz", {"x": np.zeros((8, 2))}),
    ],
)
def test_samples_of_another_shape_are_reported_in_one_sentence(
    tmp_path, monkeypatch, name, changes
):
    monkeypatch.setattr(page_module, "data_url", lambda *_: "data:,")
    monkeypatch.setattr(grids, "data_url", lambda *_: "data:,")
    workdir = make_run(tmp_path / "run", results=rows_of(fd=1.0))
    file = workdir / "samples" / name
    with np.load(file) as arrays:
        changed = dict(arrays) | changes
    np.savez(file, **{key: each for key, each in changed.items() if each is not None})
    with pytest.raises(UserError, match=rf"^{file} holds no samples [^\n]*$"):
        write_report(workdir)


def test_a_pipe_in_place_of_samples_is_not_waited_for(tmp_path):
    workdir = make_run(tmp_path / "run", results=rows_of(fd=1.0))
    file = workdir / "samples" / "teacher_ddim_16_w1_path.npz"
    file.unlink()
    os.mkfifo(file)
    shown = read_results(workdir / "results.csv")
    assert len(grids.paths(workdir, shown)[1]) == 4


def test_a_log_without_a_loss_is_shown(tmp_path):
    workdir = make_run(tmp_path / "run", results=rows_of(fd=1.0))
    (workdir / "teacher" / "metrics.jsonl").write_text('{"step": 3}\n')
    assert "3 of 1000" in written(workdir)


def section(page, name):
    """The part of the page from one heading to the next."""
    return page.split(f'<h2 id="{name}">')[1].split("<h2")[0]


def test_a_whole_run_has_every_section_and_nothing_from_elsewhere(page):
    for name in ("quality", "rounds", "weights", "paths", "training", "results", "config"):
        assert f'<a href="#{name}">' in page
        assert section(page, name)
    assert "shortfalls" not in page
    assert "round-trips" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in page
    assert len(re.findall(r"<img [^>]*alt=\"[^\"]{10,}", page)) == page.count("<img")


def test_the_slider_has_the_student_and_its_teacher_at_every_w(page):
    frames = re.findall(r'data-frame="(.*?)">(.*?)(?=<div data-frame|<h2)', page, re.DOTALL)
    assert [name for name, _ in frames] == [f"w = {w:g}" for w in WEIGHTS]
    for name, rows in frames:
        alts = re.findall(r'alt="(.*?)"', rows)
        assert [alt.split(": ")[0] for alt in alts] == [f"10 samples at {name}"] * 2
        assert [re.search(r": (\w+, \d+ steps)", alt)[1] for alt in alts] == [
            "student, 4 steps",
            "teacher, 16 steps",
        ]


def test_the_teacher_beside_the_student_is_one_that_was_measured_at_every_w():
    rows = rows_of(fd=1.0)
    longer = dataclasses.replace(ROW, num_steps=256, w=1.0)
    found = {(each.stage, each.num_steps) for each in pair([*rows, longer])}
    assert found == {("halving", 4), ("teacher", 16)}
    everywhere = [dataclasses.replace(longer, w=w) for w in WEIGHTS]
    assert ("teacher", 256) in {(each.stage, each.num_steps) for each in pair([*rows, *everywhere])}


def test_headline_and_tiles_are_means_over_what_all_were_measured_at():
    # Without the row, a mean over every w would compare w = 0, 1, 4 with w = 0, 1.
    rows = [each for each in rows_of(fd=1.0) if (each.num_steps, each.w) != (2, 4.0)]
    sentence = headline(rows)
    assert "Fréchet distance 1.750. Its teacher: 1.500 at 16 steps, 32 calls" in sentence
    assert "Mean over w = 0, 1, with n = 64" in sentence
    calls, distance, time = tiles(rows)
    assert (calls["value"], calls["words"]) == ("4", "teacher: 32")
    assert (distance["value"], distance["words"]) == ("1.75", "teacher: 1.5")
    assert (time["value"], time["words"]) == ("6.2 ms", "teacher: 50 ms, 8 times as long")


def test_unknown_seconds_are_left_out():
    rows = rows_of(fd=1.0, seconds=None)
    assert not timed(rows)
    assert [tile["name"] for tile in tiles(rows)] == [
        "Network calls per sample",
        "Fréchet distance",
    ]


def shortfalls_of(workdir, results):
    experiment = read_config(workdir)
    logs = {stage.name: read_metrics(workdir / stage.name) for stage in all_stages(experiment)}
    return shortfalls(workdir, experiment, results, logs)


def test_what_failed_or_is_missing_is_reported(tmp_path):
    results = [each for each in rows_of(fd=1.0) if (each.num_steps, each.w) != (2, 4.0)]
    workdir = make_run(tmp_path / "run", results=results, skipped=3)
    (workdir / "halving_ddim_1").rmtree()
    checkpoint = workdir / "guidance" / "checkpoints" / "1000"
    checkpoint.rename(checkpoint.parent / "600")
    steps = {"teacher": 1000, "guidance": 1000, "halving_ddim_4": 1000, "halving_ddim_2": 2000}
    assert shortfalls_of(workdir, results) == [
        *(
            f"{name} skipped 3 of its first {count} updates, because the loss or gradient was not finite."
            for name, count in steps.items()
        ),
        "guidance is not finished: 600 of 1000 updates.",
        "Not trained in this folder: halving_ddim_1.",
        "Not measured, though the config asks for it: student, 2 steps (ddim) at w = 4.",
    ]


def test_a_run_that_started_from_another_is_not_blamed_for_its_teacher(tmp_path):
    config = {"start_from": "elsewhere/teacher"}
    results = [each for each in rows_of(fd=1.0) if each.stage == "halving"]
    workdir = make_run(tmp_path / "run", results=results, config=config)
    for name in ("teacher", "guidance"):
        (workdir / name).rmtree()
    assert shortfalls_of(workdir, results) == []
    assert "of the stages trained so far" in headline(results)
    stages = re.findall(r'<th scope="row">(.*?)</th>', section(written(workdir), "training"))
    assert stages == ["halving_ddim_4", "halving_ddim_2", "halving_ddim_1"]


def test_what_was_trained_here_is_listed_whatever_the_config_asks_for_now(tmp_path):
    workdir = make_run(tmp_path / "run", results=rows_of(fd=1.0), config={"stage": "halving"})
    stages = re.findall(r'<th scope="row">(.*?)</th>', section(written(workdir), "training"))
    assert stages[:2] == ["teacher", "guidance"]


def test_one_w_needs_no_knob_and_no_panel_of_its_own(tmp_path, page):
    results = [each for each in rows_of(fd=1.0) if each.w == 1.0]
    alone = written(make_run(tmp_path / "run", results=results))
    for part in ('<h2 id="weights">', "a panel for each guidance weight"):
        assert part in page
        assert part not in alone


def test_a_run_with_only_real_images_measured_has_a_page(tmp_path):
    real = dataclasses.replace(ROW, stage="real", sampler=None, num_steps=None, w=None)
    workdir = make_run(tmp_path / "run", results=[real])
    for log in workdir.glob("*/metrics.jsonl"):
        log.unlink()
    page = written(workdir)
    assert "<img" not in page
    missing = section(page, "shortfalls")
    assert "Not measured, though the config asks for it: teacher, 16 steps" in missing


def test_losses_that_no_logarithm_has_are_drawn():
    log = [{"step": 1, "loss": -0.5}, {"step": 2, "loss": 0.0}, {"step": 3, "loss": None}]
    loss_figure({"teacher": log}).savefig(io.BytesIO())
