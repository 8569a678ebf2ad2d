"""Every second stage, from its config to samples and exports."""

import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from guided_distill import cli
from guided_distill.config import SECOND_STAGES
from guided_distill.evaluation.results import read_results
from guided_distill.runs.trained import load_finished
from guided_distill.sampling.labels import of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample

# For the methods that differentiate the network in time.
SMOOTH = [
    "--config.model.options={'width': 16, 'depth': 1, 'embedding_width': 16, 'time_scale': 10.0}"
]
STUDENTS = {"consistency": 2, "continuous": 1}
MIXTURE = Path(__file__).parent.parent / "configs" / "mixture2d.py"


def train(workdir, *more):
    config = f"{MIXTURE}:runlocal"
    return cli.main(["train", "--config", config, "--workdir", str(workdir), *SMOOTH, *more])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A run with a teacher and stage one."""
    workdir = tmp_path_factory.mktemp("teachers")
    for stage in ("teacher", "guidance"):
        assert train(workdir, f"--config.stage={stage}") == 0
    return workdir


@pytest.mark.parametrize("kind", [kind for kind in SECOND_STAGES if kind != "halving"])
def test_its_students_are_trained_measured_and_exported(teachers, kind, tmp_path, capsys):
    workdir = epath.Path(tmp_path / "run")
    start = f"--config.start_from={teachers / 'guidance'}"
    assert train(workdir, start, f"--config.second_stage={kind}") == 0
    students = [each for each in workdir.iterdir() if each.name.startswith(f"{kind}_")]
    assert len(students) == STUDENTS[kind]
    few = ["--num_samples", "8", "--w", "1"]
    assert cli.main(["evaluate", "--workdir", str(workdir), *few]) == 0
    measured = {
        each.num_steps for each in read_results(workdir / "results.csv") if each.stage == kind
    }
    for student in students:
        about = load_finished(student).description
        assert about.num_steps in measured
        assert about.teacher["path"].endswith("guidance"), "each student's teacher is stage one"
    assert cli.main(["report", "--workdir", str(workdir)]) == 0
    assert f"{kind}_ddim" in (workdir / "report.html").read_text()
    exported = tmp_path / "exported"
    command = ["export", "--workdir", str(workdir), "--stages", student.name]
    assert cli.main([*command, "--format", "safetensors", "--out", f"{exported}.safetensors"]) == 0
    images = [
        sample(load_finished(each), Request(of_labels(np.arange(2)), 1.0))
        for each in (student, epath.Path(f"{exported}.safetensors"))
    ]
    np.testing.assert_array_equal(*images)
    capsys.readouterr()
    command = ["plan", "--config", f"{MIXTURE}:runlocal", "--topology", "v5e:2x2", "--stage", kind]
    assert cli.main([*command, *SMOOTH, f"--config.second_stage={kind}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_student_of_few_times_cannot_teach_one_of_all_times(teachers, tmp_path, capsys):
    start = f"--config.start_from={teachers / 'guidance'}"
    assert train(tmp_path / "halved", start) == 0
    (*_, student) = sorted((tmp_path / "halved").glob("halving_*"))
    capsys.readouterr()
    again = f"--config.start_from={student}"
    assert train(tmp_path / "run", again, "--config.second_stage=consistency") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "this run needs a stage trained at every t" in error
