"""Configs: what is accepted, and what is said of what isn't."""

import dataclasses
import math
import re
import runpy
import typing
from pathlib import Path

import numpy as np
import pytest

from guided_distill import config, kinds
from guided_distill.data import sources
from guided_distill.diffusion.schedules import last_log_snr
from guided_distill.errors import UserError
from guided_distill.models.outline import Outline
from guided_distill.models.registry import MODELS, check_network
from guided_distill.run_data import outline_of_latents
from guided_distill.runs.trained import network_of

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("variant", ["", "runlocal"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_parses_and_returns(file, variant):
    experiment = config.parse(runpy.run_path(str(file))["get_config"](variant))
    assert config.parse(config.to_config_dict(experiment)) == experiment
    assert experiment.halving.rounds()[-1] == experiment.halving.last_num_steps


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
        (values("halving", weighting="snr"), ["config.halving.weighting", "last_num_steps is 1"]),
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
        (values("evaluation", seed=2**64), ["config.evaluation.seed", str(2**64 - 1)]),
        (values("", stage="autoencoder"), ["config.autoencoder.steps"]),
        (
            values("teacher", label_dropout=0.0),
            ["config.teacher.label_dropout", "without a condition"],
        ),
        (values("data", condition={"text": 77}), ["config.data.condition.text"]),
        (values("", seed=10**20), ["config.seed", str(2**64 - 1)]),
        (values("evaluation", seed=-1), ["config.evaluation.seed"]),
        (values("teacher", weight_decay=10**400), ["config.teacher.weight_decay is inf"]),
        (values("halving", steps=2**31 - 1), ["config.halving.steps times few_step_factor"]),
        (values("model", schedule_options={"log_snr_min": True}), ["log_snr_min", "a number"]),
        (
            values("model", schedule_options={"log_snr_min": 5.0, "log_snr_max": 5.0}),
            ["config.model.schedule_options", "doesn't fall"],
        ),
        (
            values(
                "model", schedule="linear", schedule_options={"beta_start": 0.9, "beta_end": 0.9}
            ),
            ["config.model.schedule_options", "-60"],
        ),
        (
            {"model": {"parameterization": "x"}, "halving": {"samplers": ("ddim", "encode")}},
            ["config.halving.samplers", "encode"],
        ),
    ],
)
def test_bad_values_are_named(bad, names):
    with pytest.raises(UserError) as caught:
        config.parse(bad)
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)


def numbers(section, prefix=""):
    """(dotted key, kind) of every number of a config."""
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            yield from numbers(field.type, f"{prefix}{field.name}.")
        elif kinds.type_of(field.type) in (int, float) or kinds.range_of(field.type):
            yield f"{prefix}{field.name}", field.type


def test_every_number_has_a_range_and_is_held_to_it():
    found = dict(numbers(config.Experiment))
    assert len(found) > 50
    for key, kind in found.items():
        allowed = kinds.range_of(kind)
        assert np.isfinite([allowed.low, allowed.high]).all(), key
        alone = kinds.type_of(kind) in (int, float)
        form = kinds.type_of(kind if alone else typing.get_args(kind)[0])
        outside = [allowed.low - 1, allowed.high * 2]
        outside += [] if form is int else [math.nan, math.inf, -math.inf]
        for number in map(form, outside):
            *sections, name = key.split(".")
            bad = {name: number if alone else (number,)}
            for section in reversed(sections):
                bad = {section: bad}
            with pytest.raises(
                UserError, match=rf"^config\.{key} (is|holds) {re.escape(str(number))}; make"
            ):
                config.parse(bad)


def test_runs_that_are_there_are_read_as_they_began():
    eps = {"model": {"parameterization": "eps"}, "teacher": {"weight_decay": -1.0}}
    with pytest.raises(UserError):
        config.parse(eps)
    assert config.parse_recorded(eps).teacher.weight_decay == -1.0


# alpha^2 at the end of the chains, by the products of their definitions.
LINEAR = np.prod(1.0 - np.linspace(1e-4, 0.02, 1000))
SCALED = np.prod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.mark.parametrize(
    ("schedule", "alpha_squared"),
    [("cosine", 1.0 / (1.0 + np.exp(20.0))), ("linear", LINEAR), ("scaled_linear", SCALED)],
)
def test_eps_is_trained_with_weightings_that_bound_its_errors(schedule, alpha_squared):
    assert 1.0 / (1.0 + np.exp(-last_log_snr(schedule, {}))) == pytest.approx(alpha_squared)
    # What an error of 0.01 costs in x, whose data are of about 1.
    unbearable = 0.01**2 / alpha_squared > 1.0
    defaults = config.default_config()
    weighted = [stage for stage in config.STAGES if "weighting" in defaults[stage]]
    bearing = {name: {"weighting": "snr"} for name in weighted}
    for stage in weighted:
        for weighting in ("truncated_snr", "snr_plus_one"):
            bad = {"model": {"parameterization": "eps", "schedule": schedule}, **bearing}
            bad["halving"] = {"weighting": "snr", "last_num_steps": 2}
            bad["consistency"] = {
                "weighting": "snr",
                "num_steps": (2,),
                "last_teacher_num_steps": 512,
            }
            bad["second_stage"] = stage if stage in config.SECOND_STAGES else "halving"
            config.parse(bad)
            bad[stage] = {**bad[stage], "weighting": weighting}
            if unbearable:
                with pytest.raises(UserError, match=rf"config\.{stage}\.weighting is {weighting}"):
                    config.parse(bad)
            else:
                config.parse(bad)
    one = {"model": {"parameterization": "eps", "schedule": schedule}, **bearing}
    if unbearable:
        with pytest.raises(UserError, match=r"config\.halving\.last_num_steps is 1"):
            config.parse(one)
    else:
        config.parse(one)


def test_a_second_stage_that_is_not_used_may_change():
    halving = config.parse({})
    other = config.parse({"consistency": {"steps": 7}})
    assert config.changed_keys(halving, other) == {}
    used = [
        config.parse({"second_stage": "consistency", "consistency": {"steps": n}}) for n in (7, 8)
    ]
    assert config.changed_keys(*used) == {"consistency.steps": (7, 8)}
    assert {"second_stage", "consistency.steps"} <= config.changed_keys(halving, used[0]).keys()


def test_without_guidance_no_label_need_be_dropped():
    plain = {"guidance": {"w_max": 0.0}, "evaluation": {"weights": (0.0,)}}
    config.parse({"teacher": {"label_dropout": 0.0}, **plain})
    config.parse({"teacher": {"label_dropout": 0.0}, "start_from": "runs/other/teacher"})
    with pytest.raises(UserError, match="label_dropout"):
        config.parse({"teacher": {"label_dropout": 0.0}, "method": "two_student", **plain})


SMALL = {
    "mlp": {"width": 8, "depth": 1, "embedding_width": 8},
    "transformer": {"width": 8, "depth": 1, "num_heads": 2, "patch_size": 2, "embedding_width": 8},
    "dit": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
    "unet": {
        "width": 8,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (4,),
        "head_width": 8,
        "embedding_width": 8,
    },
    "sd_unet": {
        "block_out_channels": (8, 16),
        "cross_attention_levels": (0,),
        "num_attention_heads": (2, 4),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
    },
}


def network(name, options, shape=(8, 8, 1)):
    model = config.parse({"model": {"name": name, "options": SMALL[name] | options}}).model
    return network_of(model, Outline(shape, 10))


@pytest.mark.parametrize("name", SMALL)
def test_networks_that_can_be_made_are_let_be(name):
    check_network(network(name, {}))


def test_every_number_of_a_network_has_a_range():
    given = ("num_classes", "num_outputs", "dropout")
    for module in MODELS.values():
        for field in dataclasses.fields(module):
            if field.name not in given and kinds.type_of(field.type) in (int, float):
                assert kinds.range_of(field.type), (module, field.name)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mlp", {"depth": -1}, "depth is -1"),
        ("mlp", {"width": 0}, "width is 0"),
        ("mlp", {"width": 2.5}, "width must be a whole number"),
        ("mlp", {"embedding_width": 2}, "embedding_width is 2"),
        ("transformer", {"num_heads": 3}, "num_heads is 3, which doesn't divide width, 8"),
        (
            "transformer",
            {"patch_size": 3},
            "patch_size is 3, which doesn't divide the data's height, 8",
        ),
        ("dit", {"patch_size": 3}, "patch_size is 3"),
        ("dit", {"attention_head_dim": 3}, "attention_head_dim is 3"),
        ("unet", {"patch_size": 3}, "patch_size is 3"),
        ("unet", {"head_width": 3}, "head_width is 3"),
        ("unet", {"channel_multipliers": ()}, "channel_multipliers is empty"),
        ("unet", {"channel_multipliers": (1,) * 5}, "channel_multipliers has 5 levels"),
        ("unet", {"remat": "some"}, "remat is 'some'"),
        ("sd_unet", {"norm_num_groups": 3}, "norm_num_groups is 3"),
        ("sd_unet", {"num_attention_heads": (3, 4)}, "num_attention_heads[0] is 3"),
        ("sd_unet", {"num_attention_heads": (4,)}, "num_attention_heads has 1"),
        ("sd_unet", {"cross_attention_levels": (2,)}, "cross_attention_levels holds 2"),
    ],
)
def test_networks_that_cannot_be_made_name_the_option(name, options, said):
    with pytest.raises(UserError) as caught:
        check_network(network(name, options))
    assert str(caught.value).startswith(f"config.model.options.{said}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"norm_num_groups": 3},
            "norm_num_groups is 3, which doesn't divide block_out_channels[0], 8",
        ),
        ({"attention_levels": (2,)}, "attention_levels holds 2"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"layers_per_block": "x"}, "layers_per_block must be a whole number"),
    ],
)
def test_autoencoders_that_cannot_be_made_name_the_option(options, said):
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    experiment = config.parse({"autoencoder": {"steps": 1, "options": small | options}})
    with pytest.raises(UserError) as caught:
        outline_of_latents(sources.load_source("digits"), experiment)
    assert str(caught.value).startswith(f"config.autoencoder.options.{said}")


def test_a_network_that_breaks_in_another_way_is_a_sentence(monkeypatch):
    monkeypatch.setattr(MODELS["unet"], "misfits", lambda self, shape: ())
    with pytest.raises(
        UserError, match=r"^config\.model\.options can't build a UNet for data of 8 x 8 x 1"
    ):
        check_network(network("unet", {"patch_size": 3}))
    with pytest.raises(UserError, match=r"^config\.model\.name makes a UNet for data of 2"):
        check_network(network("unet", {}, shape=(2,)))


def test_rounds_and_their_updates():
    experiment = config.parse({"halving": {"first_num_steps": 8, "steps": 10}})
    assert experiment.halving.rounds() == (8, 4, 2, 1)
    assert [experiment.halving.updates(n) for n in experiment.halving.rounds()] == [10, 10, 20, 20]


def test_changes_that_leave_the_weights_alone_are_allowed():
    old = config.parse({})
    new = config.parse({"stage": "teacher", "evaluation": {"num_samples": 7}})
    assert config.changed_keys(old, new) == {}
    assert config.changed_keys(old, config.parse({"steps_per_dispatch": 1})) == {}
    more = config.parse({"halving": {"samplers": ("stochastic", "ddim")}})
    assert config.changed_keys(old, more) == {}
    assert config.changed_keys(more, old) == {
        "halving.samplers": (("stochastic", "ddim"), ("ddim",))
    }
    assert config.changed_keys(old, config.parse({"data": {"name": "photo10"}})) == {
        "data.name": ("digits", "photo10")
    }


def test_a_kind_of_stage_has_the_name_of_its_section():
    assert {name: kind.kind for name, kind in config.KINDS.items()} == {
        name: name for name in config.STAGES
    }
