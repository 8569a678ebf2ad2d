"""Bad input: each verb prints one sentence and starts no run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_distill import cli
from guided_distill.errors import UserError
from guided_distill.verbs.runs import read_config_file

CONFIGS = Path(__file__).parent.parent / "configs"
DIGITS, OWN_IMAGES = CONFIGS / "digits.py", CONFIGS / "own_images.py"


def train(workdir, *more):
    arguments = ["train", "--config", f"{DIGITS}:runlocal", "--workdir", str(workdir)]
    return cli.main([*arguments, *more])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "nothing.py"], "nothing.py"),
        (["--config", "no\nthing.py"], "no thing.py"),
        (["--config", f"{DIGITS}:runlocl"], "no variant 'runlocl'; choose from long, runlocal"),
        (["--config", f"{DIGITS}", "--config.teacher.stpes=3"], "config.teacher.stpes"),
        (["--config", f"{DIGITS}", "--config.teacher.steps=x"], "config.teacher.steps"),
        (["--config", f"{DIGITS}", "--config.guidance.w_min=9"], "config.guidance.w_min"),
        (["--config", f"{DIGITS}", "--config.halving.first_num_steps=12"], "first_num_steps"),
        (["--config", f"{DIGITS}", "--config.data.name=folder:/nothing"], "/nothing"),
        (["--config", f"{DIGITS}", "--config.data.image_size=16"], "data.image_size"),
        (["--config", f"{DIGITS}", "--config.model.options.width=x"], "width"),
        (["--config", f"{DIGITS}", "--config.model.options.width=0"], "model.options.width is 0"),
        (["--config", f"{DIGITS}", "--config.model.name=unet"], "model.options.depth"),
        (["--config", f"{DIGITS}", "--config.data.image_size=0"], "config.data.image_size is 0"),
        (["--config", f"{DIGITS}", "--config.data.image_size=-1"], "config.data.image_size is -1"),
        (
            ["--config", f"{DIGITS}", "--config.teacher.batch_size=100000000000"],
            "teacher.batch_size",
        ),
        (["--config", f"{DIGITS}", "--config.guidance.w_max=inf"], "config.guidance.w_max is inf"),
        (["--config", f"{DIGITS}", "--config.teacher.weight_decay=nan"], "teacher.weight_decay"),
        (["--config", f"{DIGITS}", f"--config.evaluation.seed={10**20}"], "config.evaluation.seed"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, said):
    assert cli.main(["train", "--workdir", str(tmp_path / "run"), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("guided-distill: ")
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("verb", "flag", "value", "said"),
    [
        ("sample", "--seed", "99999999999999999999", "make it at least 0 and at most 18446744073"),
        ("sample", "--num_steps", "2147483648", "make it at least 1 and at most 16384"),
        ("sample", "--w", "nan", "make it at least -1000"),
        ("sample", "--w", "-inf", "make it at least -1000"),
        ("sample", "--stage", "../other/teacher", "the name of a stage's folder"),
        ("sample", "--out", "", "is empty"),
        ("transfer", "--seed", "-1", "make it at least 0"),
        ("transfer", "--w_encode", "nan", "make it at least -1000"),
        ("edit", "--strength", "nan", "make it greater than 0"),
        ("evaluate", "--w", "0,nan", "make it at least -1000"),
        ("evaluate", "--num_steps", "4,0", "make it at least 1"),
        ("export", "--stages", "teacher,../x/teacher", "the name of a stage's folder"),
        ("export", "--out", "", "is empty"),
        ("serve", "--port", "99999", "at most 65535"),
        ("encode", "--batch_size", "0", "make it at least 1"),
        ("train", "--workdir", "", "is empty"),
    ],
)
def test_a_flag_out_of_its_range_is_one_sentence(capsys, verb, flag, value, said):
    assert cli.main([verb, f"{flag}={value}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"guided-distill: {flag} is ")
    assert said in line


def test_none_is_a_value_where_a_key_may_be_none():
    overrides = ["data.image_size=None", "start_from=None", "data.text_encoder=None", "seed=3"]
    given = [f"--config.{override}" for override in ["start_from=a/teacher", *overrides]]
    config = read_config_file(str(OWN_IMAGES), given)
    assert (config.data.image_size, config.start_from, config.data.text_encoder) == (None,) * 3
    assert config.seed == 3
    with pytest.raises(UserError, match="an override doesn't fit"):
        read_config_file(str(DIGITS), ["--config.teacher.steps=None"])


def whole(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)


def cut(path):
    whole(path)
    path.write_bytes(path.read_bytes()[:3000])


def small(path):
    Image.new("RGB", (8, 8)).save(path)


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        ([], "no images"),
        ([whole, lambda path: path.write_bytes(b"no picture")], "b.png can't be read"),
        ([cut, cut], ".png can't be read"),
        ([whole, small], "b.png is 8 x 8"),
    ],
    ids=["empty", "corrupt header", "corrupt pixels", "wrong size"],
)
def test_bad_images_are_one_sentence(tmp_path, capsys, pictures, said):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, write in zip("ab", pictures, strict=False):
        write(folder / f"{name}.png")
    assert train(tmp_path / "run", f"--config.data.name=folder:{folder}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("guided-distill: ")
    assert said in line


def test_gray_images_for_a_colour_config_are_one_sentence(tmp_path, capsys):
    gray = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez(tmp_path / "gray.npz", image=gray)
    source = f"--config.data.name=npz:{tmp_path / 'gray.npz'}"
    assert train(tmp_path / "run", source, "--config.data.channels=3") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("guided-distill: config.data.channels is 3")
    assert "gray.npz has 1" in line


@pytest.mark.parametrize(("channels", "status"), [(1, 2), (3, 0)])
def test_a_folder_of_gray_images_is_colour(tmp_path, capsys, channels, status):
    (tmp_path / "images").mkdir()
    for index in range(4):
        Image.new("L", (8, 8), 50 * index).save(tmp_path / "images" / f"{index}.png")
    source = f"--config.data.name=folder:{tmp_path / 'images'}"
    more = [source, f"--config.data.channels={channels}", "--config.stage=teacher"]
    assert train(tmp_path / "run", *more) == status
    assert ("config.data.channels is 1" in capsys.readouterr().err) == (channels == 1)


@pytest.mark.parametrize(
    "verb", ["train", "sample", "transfer", "evaluate", "report", "import", "export"]
)
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0
    assert f"example: guided-distill {verb} --" in capsys.readouterr().out
