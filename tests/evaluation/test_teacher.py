"""Comparison with the teacher's samples: what distillation itself loses."""

from pathlib import Path

import numpy as np
import pytest
from etils import epath

from guided_distill import cli
from guided_distill.evaluation import outputs as outputs_module
from guided_distill.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from guided_distill.evaluation.outputs import squared_errors
from guided_distill.evaluation.results import read_results
from guided_distill.runs.trained import load_finished
from guided_distill.sampling.labels import cycling_labels, of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample

MIXTURE = Path(__file__).parents[2] / "configs" / "mixture2d.py"
W, COUNT, SEED, STEPS = 1.0, 48, 3, 6


def train(workdir, *more):
    flags = [
        "--config.halving.first_num_steps=2",
        "--config.halving.samplers=('ddim','stochastic')",
    ]
    return cli.main(
        ["train", "--config", f"{MIXTURE}:runlocal", "--workdir", str(workdir), *flags, *more]
    )


def evaluate(workdir, *more):
    flags = ["--num_samples", str(COUNT), "--w", str(W), "--num_steps", str(STEPS)]
    return cli.main(["evaluate", "--workdir", str(workdir), *flags, *more])


def rows(workdir):
    return {
        (each.stage, each.sampler, each.num_steps): each
        for each in read_results(epath.Path(workdir) / "results.csv")
    }


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert train(workdir, f"--config.evaluation.seed={SEED}") == 0
    assert evaluate(workdir, "--stages", "halving_ddim_2") == 0
    assert {each.fd_teacher for each in rows(workdir).values()} == {None}
    assert evaluate(workdir, "--against_teacher", str(STEPS)) == 0
    return workdir


def samples_of(workdir, stage, *, seed=SEED):
    trained = load_finished(epath.Path(workdir) / stage)
    labels = cycling_labels(COUNT, len(trained.description.class_names))
    num_steps = STEPS if stage == "teacher" else None
    return sample(trained, Request(of_labels(labels), W, num_steps=num_steps, seed=seed))


def test_distances_are_to_the_teachers_samples(workdir):
    found = rows(workdir)
    own, others = (samples_of(workdir, "teacher", seed=seed) for seed in (SEED, SEED + 2**63))
    floor = [FeatureStatistics.from_features(each) for each in (own, others)]
    teacher = found["teacher", "ddim", STEPS]
    assert teacher.fd_teacher == pytest.approx(frechet_distance(*floor), rel=1e-4)
    assert 0 < teacher.fd_teacher_se < 1
    assert teacher.rmse_teacher == pytest.approx(0, abs=1e-6)
    for num_steps in (2, 1):
        student = samples_of(workdir, f"halving_ddim_{num_steps}")
        row = found["halving", "ddim", num_steps]
        assert row.rmse_teacher == pytest.approx(np.sqrt(np.mean((student - own) ** 2)), rel=1e-4)
        statistics = FeatureStatistics.from_features(student)
        assert row.fd_teacher == pytest.approx(frechet_distance(statistics, floor[1]), rel=1e-4)
        stochastic = found["halving", "stochastic", num_steps]
        assert stochastic.rmse_teacher is None
        assert stochastic.fd_teacher > 0
    real = found["real", None, None]
    assert (real.fd_teacher, real.teacher) == (None, None)


def test_rows_are_kept_unless_they_are_compared_with_other_steps(workdir):
    before = (workdir / "results.csv").read_text()
    files = set((workdir / "reference").glob("*_teacher_w1_*.npz"))
    assert len(files) == 1
    assert evaluate(workdir, "--stages", "halving_ddim_1") == 0
    assert evaluate(workdir, "--against_teacher", str(STEPS)) == 0
    assert (workdir / "results.csv").read_text() == before
    (file,) = files
    file.write_bytes(file.read_bytes()[:-30])
    student = ("--stages", "halving_ddim_1")
    assert evaluate(workdir, "--against_teacher", str(STEPS), "--again", *student) == 0
    again = rows(workdir)["halving", "ddim", 1]
    old = next(each for each in before.splitlines() if each.startswith("halving,ddim,1,"))
    assert repr(again.fd_teacher) in old
    assert repr(again.rmse_teacher) in old
    assert evaluate(workdir, "--against_teacher", "5", *student) == 0
    other = rows(workdir)["halving", "ddim", 1]
    assert other.rmse_teacher != again.rmse_teacher
    assert (other.teacher.split("@")[1], again.teacher.split("@")[1]) == ("5", str(STEPS))
    assert rows(workdir)["halving", "ddim", 2].teacher == again.teacher


def test_a_run_that_starts_from_a_teacher_is_compared_with_it(workdir, tmp_path, capsys):
    assert train(tmp_path / "other", f"--config.start_from={workdir / 'teacher'}") == 0
    student = ("--stages", "halving_ddim_2")
    assert evaluate(tmp_path / "other", "--against_teacher", str(STEPS), *student) == 0
    teacher = rows(workdir)["teacher", "ddim", STEPS].teacher
    assert rows(tmp_path / "other")["halving", "ddim", 2].teacher == teacher
    assert train(tmp_path / "third", f"--config.start_from={workdir / 'guidance'}") == 0
    capsys.readouterr()
    assert evaluate(tmp_path / "third", "--against_teacher", str(STEPS)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--against_teacher needs the teacher" in line
    assert "leave the flag out" in line


def test_features_of_another_extractor_are_not_taken(workdir, tmp_path):
    """The fingerprint covers the extractor's weights, and here a reference of other data."""
    np.savez(tmp_path / "other.npz", mu=np.zeros(2), sigma=np.eye(2))
    before = set((workdir / "reference").glob("*_teacher_w1_*.npz"))
    other = ("--reference", str(tmp_path / "other.npz"), "--stages", "halving_ddim_1")
    assert evaluate(workdir, "--against_teacher", str(STEPS), *other) == 0
    assert len(set((workdir / "reference").glob("*_teacher_w1_*.npz")) - before) == 1


def test_samples_without_a_partner_have_no_error():
    samples = np.ones((4, 2, 2), np.float32)
    errors = squared_errors(samples, np.zeros((3, 2, 2)))
    np.testing.assert_array_equal(errors, [1, 1, 1, np.nan])
    assert np.isnan(squared_errors(samples, samples[:0])).all()


def test_errors_survive_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs_module, "SECONDS_BETWEEN_PARTS", 0.0)
    monkeypatch.setattr(outputs_module, "KEPT_SAMPLES", 0)
    samples, teacher = np.random.default_rng(0).normal(size=(2, 30, 5)).astype(np.float32)

    def draw(start):
        for begin in range(start, 30, 10):
            if begin == stop:
                raise KeyboardInterrupt
            yield samples[begin : begin + 10]

    def errors():
        outputs = outputs_module.row_outputs(
            draw,
            np.zeros(30),
            lambda x: (x, x[:, :0]),
            parts=epath.Path(tmp_path) / "parts",
            teacher=teacher[:25],
        )
        return np.concatenate([each.squared_errors for each in outputs])

    stop = 20
    with pytest.raises(KeyboardInterrupt):
        errors()
    stop = None
    expected = [*((samples - teacher) ** 2).mean(axis=1)[:25], *[np.nan] * 5]
    np.testing.assert_allclose(errors(), expected, rtol=1e-5)
