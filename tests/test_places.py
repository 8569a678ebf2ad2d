"""Names of files and folders: ~ for the home folder, and buckets."""

import numpy as np
import pytest
from etils import epath
from PIL import Image

import guided_distill
from guided_distill import cli, places
from guided_distill.data import sources
from guided_distill.errors import UserError
from guided_distill.evaluation.extractors.inception import inception_extractor
from guided_distill.evaluation.extractors.lite0 import lite0_extractor
from guided_distill.formats.diffusers_export import export_diffusers
from guided_distill.places import path_named
from guided_distill.text.registry import load_text_encoder
from guided_distill.verbs import shared
from guided_distill.verbs.runs import find_config


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder, while another folder is the current one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_flags_know_the_home_folder(home, capsys):
    for argument in ("~/x", f"{home}/x"):
        assert shared.path(argument) == epath.Path(home / "x")
    assert shared.path("x/~") == epath.Path("x/~")
    assert cli.main(["report", "--workdir=~/nothing"]) == 2
    assert f"{home}/nothing holds no run" in capsys.readouterr().err


def test_configs_and_data_know_the_home_folder(home):
    (home / "own.py").write_text("")
    assert find_config("~/own.py") == str(home / "own.py")
    np.savez(home / "data.npz", image=np.zeros((20, 4, 4), np.uint8))
    assert sources.load_source("npz:~/data.npz").shape == (4, 4, 1)
    (home / "images").mkdir()
    for index in range(4):
        Image.new("RGB", (4, 4)).save(home / "images" / f"{index}.png")
    assert sources.load_source("folder:~/images").shape == (4, 4, 3)
    assert path_named("~/run/teacher") == epath.Path(home / "run" / "teacher")


def test_a_name_with_nul_is_refused(home):
    with pytest.raises(UserError, match=r"'a\\x00b' contains a NUL character: give another name"):
        path_named("a\0b")
    with pytest.raises(UserError, match="NUL"):
        sources.load_source("folder:a\0b")


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: sources.load_source("encoded:~/none"), "none"),
        (lambda: load_text_encoder("minilm:~/none"), "none"),
        (lambda: inception_extractor((8, 8, 3), "~/none.pth"), "none.pth"),
        (lambda: lite0_extractor((8, 8, 3), "~/none.pth"), "none.pth"),
        (lambda: guided_distill.load("~/none"), "none"),
    ],
)
def test_what_is_missing_is_missing_in_the_home_folder(home, read, said):
    with pytest.raises(UserError, match=f"{home}/{said}"):
        read()


@pytest.fixture
def without_clients(monkeypatch):
    """Neither gcsfs nor TensorFlow is installed."""
    monkeypatch.setattr(places, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    "read",
    [
        lambda: sources.load_source("npz:gs://bucket/x.npz"),
        lambda: sources.load_source("folder:gs://bucket/x"),
        lambda: sources.load_source("parquet:gs://bucket/x"),
        lambda: sources.load_source("arrayrecord:gs://bucket/x"),
        lambda: sources.load_source("webdataset:gs://bucket/x"),
        lambda: inception_extractor((8, 8, 3), "gs://bucket/x.pth"),
        lambda: load_text_encoder("clip:gs://bucket/x"),
        lambda: guided_distill.load("gs://bucket/x"),
    ],
)
def test_a_bucket_without_its_client_is_one_sentence(without_clients, read):
    with pytest.raises(UserError, match=r"^gs://bucket/x.* gcsfs, .* the package's extra `tpu`$"):
        read()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config=configs/digits.py", "--workdir=gs://bucket/run"],
        ["import", "--from=gs://bucket/model", "--workdir={home}/run"],
        ["edit", "--workdir=run", "--image=gs://bucket/a.png", "--prompt=a"],
        ["evaluate", "--workdir=run", "--reference=gs://bucket/a.npz"],
        ["runs", "gs://bucket/runs"],
    ],
)
def test_flags_report_a_missing_client(without_clients, home, capsys, arguments):
    assert cli.main([each.format(home=home) for each in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "in a bucket, but gcsfs, which reads buckets, isn't installed" in line


BUCKET = epath.Path("gs://bucket/x")


@pytest.mark.parametrize(
    "work",
    [
        lambda: sources.load_source("encoded:gs://bucket/x"),
        lambda: export_diffusers(epath.Path("run"), BUCKET),
    ],
)
def test_a_bucket_is_refused_for_data_that_must_be_on_a_disk(work):
    with pytest.raises(UserError, match=r"^gs://bucket/x is in a bucket, and .* must be on a disk"):
        work()


def test_an_encoding_is_not_written_to_a_bucket(monkeypatch, capsys):
    monkeypatch.setattr(places, "find_spec", lambda name: name)
    arguments = ["--data=digits", "--autoencoder=none", "--out=gs://bucket/x"]
    assert cli.main(["encode", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "gs://bucket/x is in a bucket, and encoded data must be on a disk" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("s3://bucket/run", "s3fs, which reads buckets, isn't installed"),
        ("ftp://host/run", "is in an unknown kind of bucket"),
        ("\udc80", "is not a name in UTF-8"),
    ],
)
@pytest.mark.parametrize("flag", ["--workdir", "--out"])
def test_names_that_cannot_be_read_are_refused(without_clients, tmp_path, capsys, flag, name, said):
    places_named = {"--workdir": str(tmp_path), "--out": str(tmp_path / "out")} | {flag: name}
    assert cli.main(["export", *(word for pair in places_named.items() for word in pair)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
