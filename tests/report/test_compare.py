"""The comparison of runs: which are comparable, where their configs differ, and what the page shows."""

import dataclasses
import html
import re

import pytest
from etils import epath
from run_folder import ROW, make_run, rows_of

from guided_distill import cli
from guided_distill.experiments.studies import without_shared_parts
from guided_distill.report.compare import (
    comparable_runs,
    read_runs,
    summary,
    why_left_out,
    write_comparison,
)


def run(folder, fd=1.0, *, config=None, **changes):
    return make_run(folder, results=rows_of(fd=fd, **changes), config=config)


def test_runs_are_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, fd, seed in (("one", 1.0, 0), ("other", 3.0, 7)):
        run(tmp_path / "study" / name, fd, config={"seed": seed})
    (tmp_path / "study" / "sweep.csv").write_text("")
    files = sorted(str(file) for file in (tmp_path / "study").iterdir())
    assert cli.main(["compare", *files, "--out", "both.html"]) == 0
    assert capsys.readouterr().out == "both.html\n"
    page = html.unescape((tmp_path / "both.html").read_text())
    assert "Fréchet distance on digits, classifier-64d, n = 64; mean over w = 0, 1, 4" in page
    assert "left out" not in page
    (body,) = re.findall(r"<tbody>(.*?)</tbody>", page.split('id="configs"')[1], re.DOTALL)[:1]
    assert re.findall(r"<t[hd].*?>(.*?)</t[hd]>", body) == ["seed", "0", "7"]
    for name in ("one", "other"):
        assert page.count(f"samples at w = 1: {name}: student, 4 steps") == 1
        assert page.count(f"samples at w = 1: {name}: teacher, 16 steps") == 1
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 9000}, "apart: measured on digits, classifier-64d, n = 9000"),
        ({"extractor": "classifier-64d@x"}, "apart: measured on digits, classifier-64d@x, n = 64"),
        (
            {"config": {"data": {"name": "photo10"}}},
            "apart: measured on photo10, classifier-64d, n = 64",
        ),
    ],
)
def test_what_does_not_compare_is_left_out_and_named(tmp_path, changes, said):
    folders = [run(tmp_path / name) for name in ("one", "other")]
    apart = run(tmp_path / "apart", **changes)
    runs = read_runs([apart, *folders])
    shown, _ = comparable_runs(runs)
    assert list(shown) == ["one", "other"]
    assert f"apart: {why_left_out(runs['apart'])}" == said


def test_a_run_that_is_left_out_is_named_on_the_page(tmp_path):
    folders = [run(tmp_path / "one"), run(tmp_path / "other"), run(tmp_path / "apart", n=9000)]
    page = write_comparison(folders, epath.Path(tmp_path / "page.html")).read_text()
    assert "<li>apart: measured on digits, classifier-64d, n = 9000</li>" in page
    assert "apart: student" not in page
    assert "one: student" in page


def test_the_ground_that_most_runs_share_is_chosen(tmp_path):
    both = rows_of(fd=1.0) + rows_of(fd=9.0, n=9000)
    one = make_run(tmp_path / "one", results=both)
    other = run(tmp_path / "other")
    real = dataclasses.replace(ROW, stage="real", sampler=None, num_steps=None, w=None, n=5)
    third = make_run(tmp_path / "third", results=[real])
    shown, ground = comparable_runs(read_runs([one, other, third]))
    assert list(shown) == ["one", "other"]
    assert ground.n == 64
    assert {each.n for each in shown["one"].results} == {64}


def test_the_table_has_each_sampler_and_marks_the_least():
    runs = {"a": rows_of(fd=1.0), "b": rows_of(fd=2.0)}
    runs["b"] += [
        dataclasses.replace(ROW, stage="halving", sampler="stochastic", num_steps=2, fd=0.5)
    ]
    heads, body = summary(runs)
    assert heads == ["run", "students", "its teacher", "4 steps", "2 steps", "1 step"]
    assert body == [
        [
            "a",
            "ddim",
            "2.667 (16 steps)",
            "<strong>2.917</strong>",
            "3.167",
            "<strong>3.667</strong>",
        ],
        ["b", "ddim", "3.667 (16 steps)", "3.917", "4.167", "4.667"],
        ["b", "stochastic", "3.667 (16 steps)", "", "<strong>0.5</strong>", ""],
    ]


def test_runs_of_one_name_are_named_by_their_paths(tmp_path):
    folders = [run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert list(read_runs([*folders, *folders])) == [str(folder) for folder in folders]


def test_points_of_a_sweep_are_named_by_the_parts_that_differ(tmp_path):
    names = [f"a.low=0,a.high={high},b=1" for high in (1, 2)]
    assert list(read_runs([run(tmp_path / name) for name in names])) == ["a.high=1", "a.high=2"]
    assert list(read_runs([tmp_path / names[0]])) == [names[0]]


@pytest.mark.parametrize("names", [["a=1", "a=1,b=2"], ["a=1,b=2", "b=2,a=1"], ["x,y"], []])
def test_names_are_not_shortened_if_the_rest_would_be_ambiguous(names):
    assert without_shared_parts(names) == names


def test_bad_input(tmp_path, capsys):
    out = ["--out", str(tmp_path / "page.html")]
    assert cli.main(["compare", str(tmp_path / "nothing"), *out]) == 2
    assert "nothing holds no run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["compare", str(tmp_path / "file"), *out]) == 2
    assert "name the folders of runs" in capsys.readouterr().err
    unmeasured = make_run(tmp_path / "run", results=[])
    assert cli.main(["compare", str(unmeasured), *out]) == 2
    assert "none of the runs was evaluated" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
