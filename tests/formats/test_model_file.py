"""A trained model in one file: what it holds, where it is read, and files that aren't such."""

import hashlib
import json
import os
import re
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath
from flax.traverse_util import flatten_dict

import guided_distill
from guided_distill import cli
from guided_distill.errors import UserError
from guided_distill.formats.safetensors_file import read_metadata
from guided_distill.runs.model_file import write_model_file
from guided_distill.runs.trained import load_finished, load_trained, read_finished
from guided_distill.sampling.labels import of_labels
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import sample
from guided_distill.training.checkpoints import StageCheckpoints

STAGE = "halving_ddim_2"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_arguments):
    path = epath.Path(tmp_path_factory.mktemp("run"))
    more = ["--config.halving.last_num_steps=2"]
    assert cli.main(["train", "--workdir", str(path), *tiny_arguments, *more]) == 0
    return path


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """The student and the teacher, each in a file by its stage's name."""
    folder = epath.Path(tmp_path_factory.mktemp("files"))
    for stage in (STAGE, "teacher"):
        assert export(run, folder / f"{stage}.safetensors", "--stages", stage) == 0
    return folder


@pytest.fixture
def student(files):
    return files / f"{STAGE}.safetensors"


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A teacher of texts in a latent space, with its companions."""
    folder = epath.Path(tmp_path_factory.mktemp("texts"))
    tiny.write_pipeline(folder / "pipeline")
    arguments = ["--from", str(folder / "pipeline"), "--workdir", str(folder / "run")]
    assert cli.main(["import", *arguments]) == 0
    return folder / "run"


def export(workdir, out, *flags, form="safetensors"):
    places = ["--workdir", str(workdir), "--out", str(out)]
    return cli.main(["export", "--format", form, *places, *flags])


def drawn(trained, **request):
    return sample(trained, Request(condition=of_labels([3, 7, 3]), w=1.0, seed=4, **request))


def refused(capsys, status):
    """The one sentence on stderr."""
    assert status == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_it_is_the_stage_bit_for_bit(run, student, assert_same_weights):
    stage, file = load_finished(run / STAGE), load_finished(student)
    assert_same_weights(file.params, stage.params)
    assert [leaf.sharding for leaf in jax.tree.leaves(file.params)] == [
        leaf.sharding for leaf in jax.tree.leaves(stage.params)
    ]
    assert file.description == stage.description == read_finished(student)
    assert (file.step, file.finished, file.name) == (stage.step, True, STAGE)
    np.testing.assert_array_equal(drawn(file), drawn(stage))


def test_float16_rounds_once(run, tmp_path):
    half, again = tmp_path / "half.safetensors", tmp_path / "again.safetensors"
    assert export(run, half, "--stages", STAGE, "--dtype", "float16") == 0
    stage, file = load_finished(run / STAGE), load_finished(epath.Path(half))
    assert file.description == stage.description
    for ours, theirs in zip(*map(jax.tree.leaves, (file.params, stage.params)), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=2**-11, atol=2**-25)
    assert 0 < np.abs(drawn(file) - drawn(stage)).max() < 0.05
    assert export(half, again, "--dtype", "float16") == 0
    once, twice = (safetensors.numpy.load_file(path) for path in (half, again))
    assert read_metadata(epath.Path(again)) == read_metadata(epath.Path(half))
    assert {name: each.tobytes() for name, each in twice.items()} == {
        name: each.tobytes() for name, each in once.items()
    }


def test_others_can_read_it(run, student):
    """No reader but the format's own library, and JSON."""
    with safetensors.safe_open(student, framework="numpy") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    params = load_finished(run / STAGE).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        np.testing.assert_array_equal(tensors.pop(name), leaf)
    assert not tensors
    assert about["num_steps"] == 2


def test_it_is_sampled_as_its_stage_is(run, student):
    images = guided_distill.load(student).sample(labels=["3", 7], w=1.5)
    expected = guided_distill.load(run / STAGE).sample(labels=["3", 7], w=1.5)
    np.testing.assert_array_equal(images, expected)
    for workdir, more in ((run, ["--stage", STAGE]), (student, [])):
        assert cli.main(["sample", "--workdir", str(workdir), "--num", "4", *more]) == 0
    names = {path.name for path in (run / "samples").iterdir()}
    assert names == {path.name for path in (student.parent / "samples").iterdir()}
    (name,) = (name for name in names if name.endswith(".npz"))
    ours, theirs = (np.load(each / "samples" / name)["image"] for each in (student.parent, run))
    np.testing.assert_array_equal(ours, theirs)


def test_weights_are_split_over_a_mesh(student, mesh_of, assert_same_weights):
    whole = load_finished(student).params
    split = load_finished(student, mesh_of(8, fsdp=4)).params
    assert_same_weights(split, whole)
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))


@pytest.mark.parametrize("key", ["start_from", "teacher.initial"])
def test_a_run_starts_from_it(files, tmp_path, tiny_arguments, key):
    teacher = files / "teacher.safetensors"
    workdir = epath.Path(tmp_path / "new")
    stage = "guidance" if key == "start_from" else "teacher"
    more = [f"--config.{key}={teacher}", f"--config.stage={stage}"]
    more += [f"--config.{stage}.learning_rate=1e-12", f"--config.{stage}.ema_decay=0.0"]
    assert cli.main(["train", "--workdir", str(workdir), *tiny_arguments, *more]) == 0
    new, old = load_finished(workdir / stage), load_finished(teacher)
    if key == "start_from":
        assert new.description.teacher == {"path": str(teacher), "step": old.step}
    found = flatten_dict(new.params)
    for path, leaf in flatten_dict(old.params).items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-9)


def test_a_run_is_made_of_it(run, student, tmp_path, tiny_arguments, assert_same_weights):
    workdir = epath.Path(tmp_path / "run")
    assert export(student, workdir, form="checkpoint") == 0
    made, stage = load_finished(workdir / STAGE), load_finished(run / STAGE)
    assert_same_weights(made.params, stage.params)
    assert made.description == stage.description
    more = ["--config.halving.last_num_steps=2"]
    assert cli.main(["train", "--workdir", str(workdir), *tiny_arguments, *more]) == 0


def test_a_model_of_latents_has_its_companions_beside_it(text_run, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    assert export(text_run, file) == 0
    assert capsys.readouterr().out.split() == [str(file), str(tmp_path / "companions")]
    images = guided_distill.load(file).sample(prompts=["a b"], num_steps=1)
    expected = guided_distill.load(text_run).sample(prompts=["a b"], num_steps=1)
    np.testing.assert_array_equal(images, expected)
    outs = tmp_path / "of_file", tmp_path / "of_run"
    for workdir, out in zip((file, text_run), outs, strict=True):
        assert export(workdir, out, form="diffusers") == 0
    ours, theirs = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in outs
    )
    assert ours == theirs
    assert export(text_run, tmp_path / "again.safetensors") == 0
    (vae,) = (tmp_path / "companions" / "vae").glob("*.safetensors")
    vae.write_bytes(vae.read_bytes()[:-1] + b"\1")
    said = refused(capsys, export(text_run, tmp_path / "third.safetensors"))
    assert "companions belongs to another model" in said
    assert not (tmp_path / "third.safetensors").exists()


def with_header(data, change):
    """The file with another header; the tensors stay."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def redigested(data, change):
    """The file with other tensors or another description, and the digest of those."""
    tensors = safetensors.numpy.load(data)
    (length,) = struct.unpack("<Q", data[:8])
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["about"])
    change(tensors, about)
    text = json.dumps(about)
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return safetensors.numpy.save(tensors, {"about": text, "sha256": digest.hexdigest()})


def _with(name, value):
    return lambda tensors, about: about.__setitem__(name, value)


def _turn(tensors, about):
    name = max(tensors, key=lambda each: tensors[each].size)
    tensors[name] = tensors[name].T.copy()


def _set(value):
    def change(tensors, about):
        next(each for each in tensors.values() if each.ndim == 2)[0, 0] = value

    return change


DAMAGED = {
    "empty": (lambda data: b"", "can't be read as safetensors"),
    "truncated": (lambda data: data[:-4], "can't be read as safetensors"),
    "longer": (lambda data: data + bytes(4), "can't be read as safetensors"),
    "a byte": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged"),
    "another word": (lambda data: data.replace(b"digits", b"digest", 1), "is damaged"),
    "a stage's config": (
        lambda data: with_header(data, lambda header: header["__metadata__"].pop("sha256")),
        "was not written by",
    ),
    "no metadata": (lambda data: with_header(data, lambda h: h.pop("__metadata__")), "not written"),
    "a list": (
        lambda data: with_header(data, lambda h: h["__metadata__"].update(about="[]")),
        "no description in JSON",
    ),
    "other shapes": (lambda data: redigested(data, _turn), "has the wrong shape in"),
    "one less": (lambda data: redigested(data, lambda t, _: t.popitem()), "lacks"),
    "one more": (lambda data: redigested(data, lambda t, _: t.update(a=np.ones(1))), "no place"),
    "NaN": (lambda data: redigested(data, _set(np.nan)), "non-finite numbers"),
    "infinity": (lambda data: redigested(data, _set(np.inf)), "non-finite numbers"),
    "integers": (
        lambda data: redigested(
            data, lambda t, _: t.update({k: v.astype("i4") for k, v in t.items()})
        ),
        "only floating-point weights",
    ),
    "a word for steps": (
        lambda data: redigested(data, _with("num_steps", "two")),
        "num_steps must",
    ),
    "another version": (
        lambda data: redigested(data, _with("colour", 1)),
        "colour is unknown",
    ),
    "no experiment": (
        lambda data: redigested(data, lambda _, a: a.pop("experiment")),
        "'experiment'",
    ),
    "an odd condition": (
        lambda data: redigested(data, _with("condition_shapes", 3)),
        "condition_shapes",
    ),
    "an autoencoder": (lambda data: redigested(data, _with("stage", "autoencoder")), "autoencoder"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_what_is_no_such_file_is_refused(student, tmp_path, capsys, fault):
    change, said = DAMAGED[fault]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(change(student.read_bytes()))
    line = refused(capsys, cli.main(["sample", "--workdir", str(path), "--num", "1"]))
    assert str(path) in line
    assert re.search(said, line)
    assert not (tmp_path / "samples").exists()


def test_a_file_of_stable_diffusion_is_for_import(text_run, tmp_path, capsys):
    file = tmp_path / "sd.safetensors"
    safetensors.numpy.save_file({"model.diffusion_model.out.2.bias": np.ones(4)}, file)
    line = refused(capsys, cli.main(["sample", "--workdir", str(file)]))
    assert "`guided-distill import`" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--format", "diffusers", "--dtype", "float16"], "--dtype is for --format safetensors"),
        (["--dtype", "float8"], "--dtype is 'float8'; choose one of float32, float16"),
        (["--out", "student"], "give a name that ends in .safetensors"),
        (["--out", "here.safetensors"], "here.safetensors is not empty"),
        (["--stages", f"teacher,{STAGE}"], "2 are given: name one with --stages"),
    ],
)
def test_exports_that_cannot_be_say_why(run, tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("here.safetensors").write_bytes(b"")
    status = export(run, "new.safetensors", *flags)
    assert said in refused(capsys, status)
    assert {path.name for path in tmp_path.iterdir()} == {"here.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--workdir", "FILE", "--stage", "teacher"], "leave --stage out"),
        (
            ["export", "--workdir", "FILE", "--stages", "teacher", "--out", "x"],
            "leave out --stages",
        ),
        (["evaluate", "--workdir", "FILE"], "`guided-distill export --workdir FILE --out FOLDER`"),
        (["import", "--from", "FILE", "--workdir", "x"], "one of this program's own models"),
        (["sample", "--workdir", "none.safetensors"], "none.safetensors doesn't exist"),
        (["edit", "--workdir", "FILE", "--image", "x", "--prompt", "x"], "not on texts"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_uses_of_a_file_are_refused(student, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    status = cli.main([str(student) if word == "FILE" else word for word in arguments])
    assert said.replace("FILE", str(student)) in refused(capsys, status)
    assert not list(tmp_path.iterdir())


def test_weights_beyond_float16_are_not_rounded_to_infinity(tmp_path):
    path = epath.Path(tmp_path / "large.safetensors")
    with pytest.raises(UserError, match=r"a\.b holds weights above float16's 65504"):
        write_model_file(path, {"a": {"b": np.full(2, 7e4, np.float32)}}, about={}, dtype="float16")
    assert not path.exists()


def test_a_stage_that_was_cut_is_not_exported(run, tmp_path, capsys):
    trained = load_trained(run / STAGE)
    with StageCheckpoints(epath.Path(tmp_path) / "cut" / STAGE) as checkpoints:
        about = trained.description.to_json()
        checkpoints.save_result(trained.step - 1, trained.params, about=about)
    (tmp_path / "cut" / "config.json").write_bytes((run / "config.json").read_bytes())
    status = export(tmp_path / "cut", tmp_path / "x.safetensors", "--stages", STAGE)
    assert "stopped at step" in refused(capsys, status)


@pytest.mark.parametrize("umask", [0o002, 0o077], ids=oct)
def test_finished_files_follow_the_umask(run, text_run, tmp_path, umask):
    before = os.umask(umask)
    try:
        for form, out in (("safetensors", "x.safetensors"), ("checkpoint", "run")):
            assert export(run, tmp_path / out, "--stages", STAGE, form=form) == 0
        assert export(text_run, tmp_path / "texts", form="diffusers") == 0
        assert cli.main(["sample", "--workdir", str(tmp_path / "run"), "--num", "2"]) == 0
    finally:
        os.umask(before)
    copied = tmp_path / "texts" / "vae", tmp_path / "texts" / "text_encoder"
    files = [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and not set(copied) & set(path.parents)
    ]
    assert len(files) > 20
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
