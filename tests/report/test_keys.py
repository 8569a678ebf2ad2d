"""The verb config show: every key of a config, its value, its default and its meaning."""

import dataclasses
from dataclasses import MISSING
from pathlib import Path

import pytest

from guided_distill import cli, config
from guided_distill.models.registry import MODELS, NOT_OPTIONS
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL
from guided_distill.models.stable_diffusion.unet import UNet2DCondition
from guided_distill.objectives import autoencoder
from guided_distill.report.keys import keys_of, meanings
from guided_distill.verbs.runs import read_config_file

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.py")


def shown(capsys, *arguments):
    """The line of each key by its name, without the lines of meanings."""
    assert cli.main(["config", "show", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.partition("=")[0]: line.strip() for line in lines if not line.startswith(" ")}


def test_every_key_is_there_once_with_its_meaning():
    experiment = config.parse(config.default_config())
    keys = keys_of(experiment)
    values = config.default_config().to_dict(preserve_field_references=False)
    flat = {
        f"{section}.{name}" if isinstance(value, dict) else section
        for section, value in values.items()
        for name in (value if isinstance(value, dict) else [""])
    }
    names = [key.name for key in keys if not key.name.startswith("model.options.")]
    assert sorted(names) == sorted(flat - {"model.options"})
    for key in keys:
        assert key.value == key.default or key.default is MISSING
        assert key.meaning.endswith("."), key.name


def test_a_line_is_an_override(capsys):
    arguments = [f"{DIGITS}:runlocal", "--config.teacher.weight_decay=0.125"]
    lines = shown(capsys, *arguments)
    overrides = [
        f"--config.{line.partition('  (default: ')[0]}"
        for name, line in lines.items()
        if not name.endswith(("options", "condition")) and ".options." not in name
    ]
    assert len(overrides) > 60
    given = config.parse(read_config_file(DIGITS, overrides))
    expected = config.parse(read_config_file(arguments[0], arguments[1:]))
    for experiment in (given, expected):
        object.__setattr__(experiment, "model", None)
    assert given == expected


def test_a_default_is_shown_where_the_value_differs(capsys):
    lines = shown(capsys, DIGITS, "--config.seed=3", "--config.guidance.w_max=4.0")
    assert lines["seed"] == "seed=3  (default: 0)"
    assert lines["guidance.w_max"] == "guidance.w_max=4.0"


def test_options_are_those_of_the_configs_network(capsys):
    lines = shown(capsys, str(ROOT / "configs" / "sd15_laion512.py"))
    fields = {field.name for field in dataclasses.fields(UNet2DCondition)} - {*NOT_OPTIONS}
    names = {name.removeprefix("model.options.") for name in lines if "model.options." in name}
    assert names == fields


@pytest.mark.parametrize("module", [*MODELS.values(), AutoencoderKL])
def test_every_option_of_a_network_has_its_meaning(module):
    names = {field.name for field in dataclasses.fields(module)}
    assert names - {*NOT_OPTIONS, *autoencoder.NOT_OPTIONS} <= meanings(module).keys()


def test_names_that_a_key_allows_are_part_of_its_meaning():
    (key,) = (each for each in keys_of(config.Experiment()) if each.name == "halving.samplers")
    assert key.meaning.endswith("One of ddim, stochastic, encode.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.py"], "nothing.py, which is not a file"),
        ([DIGITS, "--config.teacher.stpes=1"], "config.teacher.stpes is not a key"),
        ([DIGITS, "--config.teacher.steps=0"], "config.teacher.steps is 0"),
        ([DIGITS, "--steps=1"], "unrecognized arguments: --steps=1"),
        ([], "the following arguments are required: CONFIG"),
    ],
)
def test_bad_arguments_are_one_sentence(capsys, arguments, words):
    assert cli.main(["config", "show", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
