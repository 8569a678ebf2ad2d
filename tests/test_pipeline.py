"""The whole pipeline, killed and not, and the commands over it."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from guided_distill import cli
from guided_distill.applications import style_transfer
from guided_distill.data import sources
from guided_distill.diffusion import samplers
from guided_distill.errors import UserError
from guided_distill.evaluation.comparison import comparable
from guided_distill.evaluation.results import COLUMNS, read_results, write_results
from guided_distill.evaluation.round_trip import evaluate_round_trips
from guided_distill.report import samples
from guided_distill.report.page import headline, write_report
from guided_distill.runs import folder as runs
from guided_distill.runs.trained import load_finished
from guided_distill.sampling.labels import cycling_labels, of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import encode, sample

DIGITS = Path(__file__).parent.parent / "configs" / "digits.py"
TINY = {
    "halving.first_num_steps": 4,
    "halving.samplers": "('ddim','stochastic','encode')",
    "teacher.steps": 12,
    "guidance.steps": 12,
    "halving.steps": 6,
    "halving.few_step_factor": 1,  # So that the rounds of a sampler share a compiled program.
}
OVERRIDES = [f"--config.{key}={value}" for key, value in TINY.items()]
STAGES = [
    "teacher",
    "guidance",
    *(f"halving_{sampler}_{n}" for sampler in ("ddim", "stochastic", "encode") for n in (4, 2, 1)),
]
UNTRAINED = "halving_stochastic_1"


def train(workdir, *more):
    arguments = ["train", "--config", f"{DIGITS}:runlocal", "--workdir", str(workdir)]
    return cli.main([*arguments, *OVERRIDES, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert train(workdir) == 0
    return workdir


def weights(workdir, stage):
    return load_finished(epath.Path(workdir) / stage)


def flat(params):
    import jax

    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(params)}


def assert_same_runs(one, other):
    for stage in STAGES:
        ours, theirs = (flat(weights(each, stage).params) for each in (one, other))
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{stage} {name}")
        if stage == UNTRAINED:
            continue
        logs = [(Path(each) / stage / "metrics.jsonl").read_text() for each in (one, other)]
        assert logs[0] == logs[1]


def test_every_stage_describes_itself(finished):
    previous = None
    for name in STAGES[:5]:
        about = weights(finished, name).description
        assert about.package_version
        assert about.data_shape == (8, 8, 1)
        assert (about.w_min, about.w_max) == ((None, None) if name == "teacher" else (0.0, 4.0))
        assert (about.teacher or {}).get("path") == previous
        previous = str(finished / name)
    last = weights(finished, STAGES[-1]).description
    assert (last.num_steps, last.sampler) == (1, "encode")
    students, teacher = (
        flat(weights(finished, "guidance").params),
        flat(weights(finished, "teacher").params),
    )
    assert students.keys() > teacher.keys()


def test_the_stochastic_student_of_one_step_is_its_teacher(finished):
    student, teacher = (weights(finished, f"halving_stochastic_{n}") for n in (1, 2))
    assert student.description.num_steps == 1
    assert student.description.teacher == {"path": teacher.path, "step": teacher.step}
    ours, theirs = flat(student.params), flat(teacher.params)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert not (finished / UNTRAINED / "metrics.jsonl").exists()
    assert UNTRAINED in runs.finished_stages(epath.Path(finished))


def test_a_start_that_does_not_fit_is_reported_before_the_folder_is_claimed(
    finished, tmp_path, capsys
):
    for start, more, words in (
        (
            "guidance",
            ["--config.method=naive"],
            "has method guided, but this run needs naive",
        ),
        ("guidance", ["--config.method=two_student"], "has method guided"),
        ("halving_ddim_4", ["--config.halving.first_num_steps=2"], "('ddim', 4)"),
        ("halving_ddim_3", [], "holds no checkpoint"),
    ):
        start = f"--config.start_from={finished / start}"
        assert train(tmp_path / "run", start, *more) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_whose_start_has_moved_resumes(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "teacher", "first/teacher")
    shutil.copytree(finished / "teacher", "other/teacher")

    def go_on(start, stage, *more):
        return train("run", f"--config.start_from={start}", f"--config.stage={stage}", *more)

    # Its config is there, and no stage.
    assert go_on("first/teacher", "halving") == 2
    assert go_on("other/teacher", "guidance") == 2
    assert "config.start_from is 'first/teacher' there and 'other/teacher'" in (
        capsys.readouterr().err
    )
    Path("first").rename("moved")
    assert go_on("first/teacher", "guidance") == 2
    assert "first/teacher holds no checkpoint" in capsys.readouterr().err
    assert go_on("./moved/teacher", "guidance") == 0
    shutil.rmtree("moved")
    for start in ("./moved/teacher", "first/teacher", tmp_path / "moved" / "teacher"):
        one = "--config.halving.samplers=('ddim','stochastic','encode')"
        assert go_on(start, "halving", "--config.halving.first_num_steps=4", one) == 0
    assert not Path("run/teacher").exists()
    for stage in ("guidance", "halving_ddim_1"):
        ours, theirs = (flat(weights(each, stage).params) for each in (tmp_path / "run", finished))
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_dispatches_and_samplers_may_change(finished, tmp_path):
    one = "--config.halving.samplers=('ddim',)"
    few = "--config.checkpoint_every=2"
    assert train(tmp_path, one, "--config.stage=teacher") == 0
    shutil.copytree(finished / "guidance", tmp_path / "guidance")
    shutil.rmtree(tmp_path / "guidance" / "checkpoints" / "12")
    assert train(tmp_path, one, few, "--config.steps_per_dispatch=2") == 0
    assert train(tmp_path, "--config.halving.samplers=('ddim','encode')") == 0
    for stage in ("guidance", "halving_ddim_1", "halving_encode_1"):
        ours, theirs = (flat(weights(each, stage).params) for each in (tmp_path, finished))
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)


def test_a_finished_run_is_left_alone(finished, capsys):
    before = (finished / "teacher" / "metrics.jsonl").stat().st_mtime_ns
    assert train(finished) == 0
    assert (finished / "teacher" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_changed_config_is_refused_with_the_keys_that_differ(finished, capsys):
    assert train(finished, "--config.teacher.learning_rate=0.5") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "config.teacher.learning_rate is 0.001 there and 0.5 here" in said


def test_one_stage_alone_and_from_another_run(finished, tmp_path, capsys):
    assert train(tmp_path / "a", "--config.stage=guidance") == 2
    assert "--config.stage=teacher" in capsys.readouterr().err
    start = f"--config.start_from={finished / 'teacher'}"
    assert train(tmp_path / "b", "--config.stage=guidance", start) == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir() if path.is_dir()) == ["guidance"]
    assert weights(tmp_path / "b", "guidance").description.teacher["path"].endswith("teacher")
    assert train(tmp_path / "c", start, "--config.model.options.width=8") == 2
    assert "has width 16, but this run needs 8" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "first"), [("guidance", 4), ("halving_ddim_4", 2)])
def test_rounds_from_another_runs_stage_are_those_of_one_run(finished, tmp_path, stage, first):
    changes = {
        "start_from": finished / stage,
        "halving.first_num_steps": first,
        "halving.last_num_steps": first,
        "halving.samplers": "('ddim',)",
    }
    arguments = [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    command = ["train", "--config", f"{DIGITS}:runlocal", "--workdir", str(tmp_path)]
    assert cli.main([*command, *arguments]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [f"halving_ddim_{first}"]
    ours, theirs = (
        flat(weights(each, f"halving_ddim_{first}").params) for each in (tmp_path, finished)
    )
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


BASELINES = {
    "single_w": {"guidance.w_min": 0.3, "guidance.w_max": 0.3},
    "naive": {"method": "naive", "guidance.w_min": 0.3, "guidance.w_max": 0.3},
    "two_student": {"method": "two_student"},
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_go_from_the_shared_teacher_to_samples(finished, tmp_path, capsys, name):
    changes = BASELINES[name] | {
        "start_from": finished / "teacher",
        "halving.first_num_steps": 1,
        "halving.samplers": "('ddim',)",
        "evaluation.weights": "(0.3,)",
    }
    arguments = [f"--config.{key}={value}" for key, value in (TINY | changes).items()]
    command = ["train", "--config", f"{DIGITS}:runlocal", "--workdir", str(tmp_path)]
    assert cli.main([*command, *arguments]) == 0
    stages = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert stages == {"halving_ddim_1"} | ({"guidance"} if name == "single_w" else set())

    student = weights(tmp_path, "halving_ddim_1")
    about, teacher = student.description, weights(finished, "teacher")
    guided = name != "two_student"
    assert (about.w_min, about.w_max) == ((0.3, 0.3) if guided else (None, None))
    assert (flat(student.params).keys() > flat(teacher.params).keys()) == guided

    command = ["sample", "--workdir", str(tmp_path), "--num", "3", "--out", str(tmp_path)]
    assert cli.main([*command, "--w", "0.3"]) == 0
    assert cli.main([*command, "--w", "1"]) == (2 if guided else 0)
    assert ("outside the range [0.3, 0.3]" in capsys.readouterr().err) == guided
    labels = np.array([0, 1, 2])
    one, other = (
        sample(
            student, Request(condition=of_labels(labels), w=w, allow_untrained=True, batch_size=4)
        )
        for w in (0.3, 3.0)
    )
    assert (one != other).any()


def test_samples_depend_on_their_index_and_seed_alone(finished):
    trained = weights(finished, "halving_stochastic_2")
    labels = cycling_labels(10, 10)
    many = sample(trained, Request(condition=of_labels(labels), w=1.0, batch_size=16))
    few = sample(trained, Request(condition=of_labels(labels[:3]), w=1.0, batch_size=4))
    np.testing.assert_allclose(many[:3], few, atol=1e-5)
    other = sample(trained, Request(of_labels(labels), 1.0, seed=1))
    assert np.abs(many - other).max() > 0.01


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--w", "5"], "outside the range [0.0, 4.0]"),
        (["--num_steps", "3"], "trained for 1 steps"),
        (["--labels", "3,12"], "--labels"),
        (["--labels", "a"], "--labels is 'a'"),
        (["--labels", "0,99999999999999999999"], "--labels is '99999999999999999999'"),
        (["--num", "0"], "--num"),
        (["--stage", "halving_encode_2"], "trained to encode"),
        (["--stage", "nothing"], "holds no checkpoint"),
    ],
)
def test_sample_refuses_what_was_not_trained(finished, capsys, arguments, said):
    assert cli.main(["sample", "--workdir", str(finished), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_sample_writes_a_picture_and_arrays(finished, tmp_path):
    arguments = ["sample", "--workdir", str(finished), "--out", str(tmp_path), "--num", "5"]
    assert cli.main([*arguments, "--w", "6", "--allow_untrained"]) == 0
    (arrays,) = tmp_path.glob("*.npz")
    with np.load(arrays) as file:
        assert file["image"].shape == (5, 8, 8, 1)
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_every_request_has_files_of_its_own(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "sample", lambda _, request: np.zeros((request.count, 8, 8, 1)))
    requests = (
        *([], ["--num_steps", "5"], ["--sampler", "stochastic"], ["--labels", "3"], ["--num", "6"]),
        *(["--seed", "1"], ["--w", "0.3333333"], ["--w", "0.33333333"], ["--stage", "guidance"]),
    )
    arguments = ["sample", "--workdir", str(finished), "--stage", "teacher", "--out", str(tmp_path)]
    for request in (*requests, *requests):
        assert cli.main([*arguments, *request]) == 0
    assert len(list(tmp_path.glob("*.npz"))) == len(list(tmp_path.glob("*.png"))) == len(requests)
    assert list(tmp_path.glob("teacher_ddim_5_w1_seed0_*.png"))


def test_export_is_a_smaller_run_that_samples_and_trains_on(finished, tmp_path, capsys):
    out = tmp_path / "out"
    stages = ["teacher", "guidance", "halving_ddim_4"]
    command = ["export", "--workdir", str(finished), "--out", str(out)]
    assert cli.main([*command, "--stages", ",".join(stages)]) == 0
    assert capsys.readouterr().out.split() == [str(out / stage) for stage in stages]
    for stage in stages:
        ours, theirs = (weights(each, stage) for each in (out, finished))
        assert ours.description == theirs.description
        for name, value in flat(theirs.params).items():
            np.testing.assert_array_equal(flat(ours.params)[name], value)
        saved = [{path.name for path in Path(each, stage).rglob("*")} for each in (out, finished)]
        assert "rest" in saved[1] - saved[0]

    assert train(out) == 0
    assert_same_runs(out, finished)
    assert cli.main([*command, "--stages", "halving_ddim_64"]) == 2
    assert "halving_ddim_64 holds no checkpoint" in capsys.readouterr().err


def test_a_run_without_workdir_is_named_by_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--config", f"{DIGITS}:runlocal", *OVERRIDES, "--config.stage=teacher"]
    assert cli.main(arguments) == 0
    assert (tmp_path / "runs" / "digits_runlocal" / "teacher").is_dir()


def test_round_trips_are_measured_once_and_as_they_say(finished):
    workdir = epath.Path(finished)
    rows = evaluate_round_trips(workdir)
    students = [(f"halving_encode_{n}", f"halving_ddim_{n}", n) for n in (4, 2, 1)]
    plain = [("guidance", "guidance", n) for n in (4, 2, 1, 256)]
    expected = [(*way, w) for way in students + plain for w in (0.0, 1.0)]
    assert [row.key[:4] for row in rows] == expected
    assert {(row.n, row.seed) for row in rows} == {(32, 0)}

    path = workdir / "round_trip.csv"
    lines = path.read_text().splitlines()
    assert lines[0] == "encoder,decoder,num_steps,w,rms_error,n,seed,checkpoints"
    marked = lines[1].split(",")
    marked[4] = "7"
    path.write_text("\n".join([lines[0], ",".join(marked), *lines[2:-1]]) + "\n")
    again = evaluate_round_trips(workdir)
    assert again[0].rms_error == 7
    assert [row.key for row in again] == [row.key for row in rows]
    assert again[-1].rms_error == pytest.approx(rows[-1].rms_error, rel=1e-5)
    path.unlink()

    encoder, decoder = (weights(finished, name) for name in students[1][:2])
    test = sources.load_source("digits", split="test")
    images, labels = test.read(
        np.sort(np.random.default_rng(0).permutation(test.size)[:32])
    ).values()

    def predictor(trained):
        denoiser = trained.description.network().denoiser(trained.params)
        return lambda z, t: denoiser.predict(z, t, of_labels(labels), np.ones(32, np.float32))

    schedule = encoder.description.network().schedule
    z = samplers.encode(predictor(encoder), schedule, images, 2)
    back = np.clip(samplers.ddim(predictor(decoder), schedule, z, None, 2), -1, 1)
    (row,) = (row for row in rows if row.key[:4] == (*students[1], 1.0))
    assert row.rms_error == pytest.approx(np.sqrt(np.mean((back - images) ** 2)), rel=1e-4)


def transfer(workdir, out, *more, **flags):
    flags = {"images": "data", "from_label": "7", "to_label": "5", "num": "3"} | flags
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return cli.main(["transfer", "--workdir", str(workdir), "--out", str(out), *arguments, *more])


def arrays_in(folder):
    (path,) = folder.glob("*.npz")
    with np.load(path) as file:
        return dict(file)


def test_transfer_carries_images_through_their_noise(finished, tmp_path):
    assert transfer(finished, tmp_path / "a") == 0
    found = arrays_in(tmp_path / "a")
    (picture,) = (tmp_path / "a").glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (3 * 64 + 2 * 8, 3 * 64 + 2 * 8)
    assert picture.stem[:-7] == "7_to_5_halving_encode_4_halving_ddim_4_w0_1_seed0"
    test = sources.load_source("digits", split="test")
    of_class = [image for image, label in zip(*test.arrays().values(), strict=True) if label == 7]
    for image in found["image"]:
        assert any(np.array_equal(image, each) for each in of_class)
    noise, decoder = found["noise"], weights(finished, "halving_ddim_4")
    encoder, own = weights(finished, "halving_encode_4"), of_labels([7] * 3)
    expected = encode(encoder, found["image"], Request(condition=own, w=0.0))
    np.testing.assert_allclose(noise, expected, atol=1e-4)
    for name, label in (("returned", 7), ("transferred", 5)):
        expected = sample(decoder, Request(condition=of_labels([label] * 3), w=1.0, noise=noise))
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
    # Barely trained networks, but the class counts for more than what is equal above may differ.
    assert np.abs(found["returned"] - found["transferred"]).max() > 1e-4

    chosen = {"encoder": "guidance", "decoder": "halving_ddim_2", "seed": 1, "w_encode": 2}
    assert transfer(finished, tmp_path / "b", to=finished, to_label=7, **chosen) == 0
    other = arrays_in(tmp_path / "b")
    np.testing.assert_array_equal(other["returned"], other["transferred"])
    assert not np.array_equal(other["image"], found["image"])


def test_transfer_reads_pictures_and_fits_them(finished, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = np.zeros((16, 40, 3), np.uint8)
    picture[:, 12:28] = 255
    Image.fromarray(picture).save(folder / "a.png")
    Image.new("L", (8, 8), 51).save(folder / "b.jpg", quality=100)
    assert transfer(finished, tmp_path / "out", images=folder, num=5) == 0
    image = arrays_in(tmp_path / "out")["image"]
    assert image.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(image[0], 1.0)
    np.testing.assert_allclose(image[1], -0.6, atol=0.02)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"from_label": "11"}, "--from_label is 11"),
        ({"to_label": "seven"}, "--to_label is 'seven'"),
        ({"w_encode": "5"}, "--w_encode is 5.0, outside"),
        ({"w": "-1"}, "--w is -1.0, outside"),
        ({"num": "0"}, "--num"),
        ({"images": "nowhere"}, "no images at nowhere"),
        ({"encoder": "halving_ddim_4"}, "not to encode"),
        ({"decoder": "halving_encode_4"}, "trained to encode"),
        ({"decoder": "halving_stochastic_4"}, "--decoder is halving_stochastic_4"),
        ({"encoder": "nothing"}, "holds no checkpoint"),
        ({"to": "nowhere"}, "nowhere holds no run"),
    ],
)
def test_transfer_refuses_in_one_sentence(finished, tmp_path, capsys, flags, said):
    assert transfer(finished, tmp_path, **flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


def test_transfer_requires_runs_of_one_shape(finished, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(finished / "halving_ddim_4", other / "halving_ddim_4")
    shutil.copy(finished / "config.json", other)

    def load(directory):
        trained = load_finished(directory)
        if other not in Path(directory).parents:
            return trained
        about = dataclasses.replace(trained.description, data_shape=(16, 16, 1))
        return dataclasses.replace(trained, description=about)

    monkeypatch.setattr(style_transfer, "load_finished", load)
    assert transfer(finished, tmp_path / "out", to=other) == 2
    said = capsys.readouterr().err
    assert f"{finished} has data of 8 x 8 x 1 and --to {other} of 16 x 16 x 1" in said


def results_stage(result):
    return f"halving_{result.sampler}_{result.num_steps}" if result.stage == "halving" else "other"


def test_evaluate_and_report(finished, capsys):
    assert cli.main(["report", "--workdir", str(finished)]) == 2
    assert "guided-distill evaluate" in capsys.readouterr().err
    assert cli.main(["evaluate", "--workdir", str(finished)]) == 0
    text = (finished / "results.csv").read_text()
    assert (
        text.splitlines()[0]
        == ",".join(COLUMNS)
        == (
            "stage,sampler,num_steps,w,fd,fd_se,kid,kid_std,precision,recall,accuracy,inception_score,"
            "alignment,caption_recall,fd_teacher,fd_teacher_se,kid_teacher,rmse_teacher,n,seconds,seed,"
            "network_calls,extractor,checkpoint,against,teacher"
        )
    )
    results = read_results(epath.Path(finished) / "results.csv")
    assert {result.stage for result in results} == {"real", "teacher", "guidance", "halving"}
    assert "encode" not in {result.sampler for result in results}
    for result in results:
        if result.num_steps is not None:
            factor = 2 if result.stage == "teacher" else 1
            assert result.network_calls == factor * result.num_steps

    file = epath.Path(finished) / "results.csv"
    wrong = [replace(result, fd=777.0) for result in results]
    another = replace(wrong[0], checkpoint="another"), replace(wrong[-1], checkpoint="another")
    write_results(file, [another[0], *wrong[1:-1], another[1]])
    students = ["evaluate", "--workdir", str(finished), "--stages", results_stage(results[-1])]
    assert cli.main(students) == 0
    measured = {result.key for result in read_results(file) if result.fd != 777}
    assert measured == {results[0].key, results[-1].key}
    assert cli.main([*students, "--again"]) == 0
    measured = {result.key for result in read_results(file) if result.fd != 777}
    stage = [each.key for each in results if results_stage(each) == results_stage(results[-1])]
    assert measured == {results[0].key, *stage}
    assert len(read_results(file)) == len(results)

    file.write_text("\n".join(text.splitlines()[:-2]) + "\n")
    assert cli.main(["evaluate", "--workdir", str(finished)]) == 0
    again = read_results(epath.Path(finished) / "results.csv")
    assert again[:-2] == results[:-2]
    assert [result.fd for result in again] == pytest.approx([r.fd for r in results], rel=1e-4)

    flags = ["--num_samples", "40", "--w", f"1,{1 / 3}", "--stages", "teacher,halving_ddim_1"]
    command = ["evaluate", "--workdir", str(finished), *flags, "--num_steps", "3"]
    assert cli.main(command) == 0
    said = capsys.readouterr().err
    assert said.count("n = 40") == 2
    with_flags = read_results(epath.Path(finished) / "results.csv")
    assert with_flags[: len(again)] == again
    assert cli.main(command) == 0
    assert read_results(epath.Path(finished) / "results.csv") == with_flags
    assert {(each.stage, each.num_steps, each.w, each.n) for each in with_flags[len(again) :]} == {
        (stage, num_steps, w, 40)
        for stage, num_steps in (("teacher", 3), ("halving", 1))
        for w in (1.0, 1 / 3)
    }
    assert not list((finished / "evaluation").rglob("*.npz"))
    events = list((finished / "tensorboard").rglob("events*"))
    assert len(events) == len(with_flags)

    drawn = {
        name: np.load(finished / "samples" / f"{name}_w0_path.npz")
        for name in ("halving_ddim_4", "halving_stochastic_2", "teacher_ddim_4")
    }
    for name, path in drawn.items():
        steps = int(name.split("_")[2])
        assert path["x"].shape == (steps, 2, 8, 8, 1)
        np.testing.assert_array_equal(path["t"], 1 - np.arange(steps) / steps)
        samples = np.load(finished / "samples" / f"{name}_w0.npz")["image"]
        np.testing.assert_allclose(path["x"][-1], samples[:2], atol=1e-4)

    page = write_report(epath.Path(finished)).read_text()
    assert "Encoding and decoding" in page
    assert headline(comparable(with_flags, "classifier")) in page
    assert "with n = 32 samples" in page
    assert "http" not in page.split("<pre>")[0]
    assert page.count("<img") == page.count("alt=")
    assert page.count("data:image/png;base64,") >= 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--extractor", "vgg"], "--extractor is 'vgg'; choose one of classifier, lite0"),
        (["--extractor", "inception:"], "--extractor is 'inception:'"),
        (["--num_samples", "3"], "--num_samples is 3"),
        (["--num_steps", "4,0"], "--num_steps is 0"),
        (["--w", "1,9"], "--w holds 9.0"),
        (["--w", "high"], "--w is 'high'"),
        (["--stages", "teacher,halving_ddim_8"], "--stages names halving_ddim_8"),
        (["--reference", "nothing.npz"], "--reference nothing.npz is not a file"),
        (["--extractor", "inception:nothing.pth"], "no weights file nothing.pth"),
    ],
)
def test_evaluate_names_the_flag_that_is_wrong(finished, capsys, arguments, said):
    assert cli.main(["evaluate", "--workdir", str(finished), *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_a_stage_without_its_config_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        runs.read_config(epath.Path(tmp_path))
    for damaged in (b"", b'{"seed": 1', b"\xff\xfe", b"[" * 99999, b"[]", b"7", b"null"):
        (tmp_path / "config.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"config\.json is damaged .*: remove it, and run"):
            runs.read_config(epath.Path(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"seed": "x"}))
    with pytest.raises(UserError, match=r"config\.seed"):
        runs.read_config(epath.Path(tmp_path))
