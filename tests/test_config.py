"""Configs: what is accepted, and what is said of what isn't."""

import runpy
from pathlib import Path

import pytest

from guided_distill import config
from guided_distill.errors import UserError

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("variant", ["", "runlocal"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_parses_and_returns(file, variant):
    experiment = config.parse(runpy.run_path(str(file))["get_config"](variant))
    assert config.parse(config.to_config_dict(experiment)) == experiment
    assert experiment.rounds()[-1] == experiment.halving.last_num_steps


def values(section, **changes):
    return {section: changes} if section else changes


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        (values("", sead=1), ["sead", "seed"]),
        (values("teacher", stpes=1), ["config.teacher.stpes"]),
        (values("teacher", steps="many"), ["config.teacher.steps", "whole number"]),
        (values("teacher", steps=0), ["config.teacher.steps"]),
        (values("teacher", weighting="snrr"), ["config.teacher.weighting", "truncated_snr"]),
        (values("halving", weighting="snr"), ["config.halving.weighting", "last_num_steps 2"]),
        (values("teacher", label_dropout=1.5), ["config.teacher.label_dropout"]),
        (values("teacher", warmup_steps=5000), ["config.teacher.warmup_steps"]),
        (values("guidance", w_min=3.0, w_max=1.0), ["w_min", "w_max"]),
        (values("halving", first_num_steps=12), ["config.halving.first_num_steps", "power of two"]),
        (values("halving", first_num_steps=2, last_num_steps=4), ["first_num_steps"]),
        (values("halving", samplers=("dpm",)), ["config.halving.samplers", "stochastic"]),
        (values("halving", samplers=()), ["config.halving.samplers", "empty"]),
        (values("halving", few_step_factor=0), ["config.halving.few_step_factor"]),
        (values("", max_nonfinite_steps=0), ["config.max_nonfinite_steps"]),
        (values("teacher", learning_rate=float("nan")), ["config.teacher.learning_rate"]),
        (values("evaluation", weights=(9.0,)), ["config.evaluation.weights", "9.0"]),
        (values("evaluation", teacher_samplers=("stochastic",)), ["teacher_samplers"]),
        (values("", log_every=30), ["config.log_every", "steps_per_dispatch"]),
        (values("data", image_size=True), ["config.data.image_size"]),
        (values("", model=3), ["config.model"]),
        (values("model", schedule_options={"beta": 1}), ["schedule_options.beta", "cosine"]),
        (values("halving", round_steps=(10, 10)), ["config.halving.round_steps", "6 rounds"]),
        (
            values("halving", round_steps=(100,) * 6, warmup_steps=100),
            ["config.halving.warmup_steps", "only 100"],
        ),
        (
            {"model": {"schedule": "scaled_linear"}, "halving": {"first_num_steps": 512}},
            ["config.halving.first_num_steps", "1024", "chain of 1000"],
        ),
        (
            {
                "model": {"schedule": "linear"},
                "evaluation": {"teacher_num_steps": (16, 1001)},
            },
            ["config.evaluation.teacher_num_steps", "1001", "chain of 1000"],
        ),
        (values("", seed=-1), ["config.seed", "-1"]),
        (values("evaluation", seed=2**64), ["config.evaluation.seed", "2^64"]),
        (values("", stage="autoencoder"), ["config.autoencoder.steps"]),
    ],
)
def test_bad_values_are_named(bad, names):
    with pytest.raises(UserError) as caught:
        config.parse(bad)
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)


def test_rounds_and_their_updates():
    experiment = config.parse({"halving": {"first_num_steps": 8, "steps": 10}})
    assert experiment.rounds() == (8, 4, 2, 1)
    assert [experiment.round_steps(n) for n in experiment.rounds()] == [10, 10, 20, 20]


def test_changes_that_leave_the_weights_alone_are_allowed():
    old = config.parse({})
    new = config.parse({"stage": "teacher", "evaluation": {"num_samples": 7}})
    assert config.changed_keys(old, new) == {}
    assert config.changed_keys(old, config.parse({"data": {"name": "photo10"}})) == {
        "data.name": ("digits", "photo10")
    }
