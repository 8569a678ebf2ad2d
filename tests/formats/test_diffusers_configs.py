"""What diffusers' configs say in our words, and which keys are refused."""

import numpy as np
import pytest
import tiny

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_configs import (
    SchedulerSettings,
    read_denoiser,
    read_scheduler,
    scheduler_config,
    unet_config,
    visited_by_diffusers,
    visited_indices,
)

# As the folders of the published models have them, less what is at its default.
SD1 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD2 = {
    **SD1,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
DIT = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
}


def test_stable_diffusion_1():
    found = read_denoiser(SD1, "F")
    assert found.name == "sd_unet"
    assert found.options["num_attention_heads"] == (8, 8, 8, 8)
    assert found.options["cross_attention_levels"] == (0, 1, 2)
    assert found.options["cross_attention_dim"] == 768
    assert found.data_shape == (64, 64, 4)
    assert not found.inpaint


def test_stable_diffusion_2():
    found = read_denoiser(SD2, "F")
    assert found.options["num_attention_heads"] == (5, 10, 20, 20)
    assert found.options["use_linear_projection"]
    assert found.data_shape == (96, 96, 4)


def test_in_painting_and_a_size_that_pipelines_mend():
    found = read_denoiser({**SD1, "in_channels": 9, "sample_size": 32}, "F")
    assert found.inpaint
    assert found.data_shape == (64, 64, 4)
    today = {**SD1, "sample_size": 32, "_diffusers_version": "0.42.1"}
    assert read_denoiser(today, "F").data_shape == (32, 32, 4)


def test_dit():
    found = read_denoiser(DIT, "F")
    assert found.name == "dit"
    assert found.num_classes == 1000
    assert found.data_shape == (32, 32, 4)
    assert found.options["learned_sigma"]
    assert not read_denoiser({**DIT, "out_channels": None}, "F").options["learned_sigma"]


@pytest.mark.parametrize("config", [SD1, SD2, {**SD1, "in_channels": 9}, tiny.UNET])
def test_a_unets_config_is_written_as_it_is_read(config):
    denoiser = read_denoiser(config, "F")
    assert read_denoiser(unet_config(denoiser, w_embedding_width=None), "F") == denoiser
    assert unet_config(denoiser, w_embedding_width=256)["time_cond_proj_dim"] == 256


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (SD1, {"_class_name": "UNet2DModel"}),
        (SD1, {"_class_name": None}),
        (SD1, {"addition_embed_type": "text_time"}),
        (SD1, {"act_fn": "gelu"}),
        (SD1, {"transformer_layers_per_block": [1, 2, 10]}),
        (SD1, {"class_embed_type": "timestep"}),
        (SD1, {"num_class_embeds": 1000}),
        (SD1, {"down_block_types": ["AttnDownBlock2D"] * 4}),
        (SD1, {"up_block_types": ["UpBlock2D"] * 4}),
        (SD1, {"mid_block_type": None}),
        (SD1, {"attention_head_dim": [8, 8]}),
        (SD1, {"num_attention_heads": 8}),
        (SD1, {"in_channels": 8}),
        (SD1, {"layers_per_block": [2, 2, 2, 2]}),
        (SD1, {"sample_size": [64, 64]}),
        (SD1, {"block_out_channels": 320}),
        (SD1, {"time_cond_proj_dim": 256}),
        (SD1, {"norm_eps": 1e-6}),
        (SD1, {"attention_head_dim": 7}),
        (SD1, {"norm_num_groups": 7}),
        (SD1, {"down_block_types": None}),
        (SD1, {"down_block_types": [None] * 4}),
        (DIT, {"patch_size": 5}),
        (SD1, {"a_key_of_the_future": "on"}),
        (DIT, {"norm_type": "layer_norm"}),
        (DIT, {"out_channels": 5}),
        (DIT, {"cross_attention_dim": 768}),
        (DIT, {"num_embeds_ada_norm": None}),
    ],
)
def test_other_networks_are_refused_by_their_key(base, change):
    (key,) = change
    with pytest.raises(UserError, match=rf"^F: {key}"):
        read_denoiser({**base, **change}, "F")


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize(
    ("prediction", "parameterization"),
    [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x")],
)
def test_a_scheduler_says_what_the_network_predicts(name, prediction, parameterization):
    config = {**tiny.SCHEDULER, "_class_name": name, "prediction_type": prediction}
    chain = read_scheduler(config, "F")
    betas = {"beta_start": 0.00085, "beta_end": 0.012}
    assert chain == SchedulerSettings(parameterization, "scaled_linear", betas)
    assert read_scheduler(scheduler_config(chain, num_steps=4), "F") == chain


def test_where_diffusers_calls_a_network():
    """As counted in its schedulers: one step more for 62 numbers, an index off by one for 49."""
    numbers = range(1, 1001)
    longer = [n for n in numbers if len(visited_by_diffusers(n)) != n]
    assert (len(longer), longer[:4]) == (62, [61, 103, 121, 122])
    other = [n for n in numbers if visited_by_diffusers(n) != visited_indices(n)]
    shifted = [n for n in other if n not in longer]
    assert (len(shifted), shifted[:4]) == (49, [48, 96, 112, 144])
    assert visited_indices(8) == [999, 874, 749, 624, 499, 374, 249, 124]
    assert not {2**k for k in range(10)} & {*other}


def test_keys_that_old_files_leave_out():
    old = {key: tiny.SCHEDULER[key] for key in ("_class_name", "beta_start", "beta_end")}
    assert read_scheduler(old, "F") == SchedulerSettings(
        "eps", "linear", {"beta_start": 0.00085, "beta_end": 0.012}
    )


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "LCMScheduler"},
        {"num_train_timesteps": 4000},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1]},
        {"prediction_type": "flow"},
        {"rescale_betas_zero_snr": True},
        {"thresholding": True},
        {"beta_start": "small"},
        {"beta_start": 0.5},
        {"beta_start": float("nan")},
        {"beta_end": float("inf")},
        {"beta_schedule": None},
        {"prediction_type": ["epsilon"]},
        {"timestep_type": "continuous"},
    ],
)
def test_other_schedulers_are_refused_by_their_key(change):
    (key,) = change
    with pytest.raises(UserError, match=rf"^F: {key}"):
        read_scheduler({**tiny.SCHEDULER, **change}, "F")


def test_the_schedulers_betas_are_those_of_our_schedule():
    from guided_distill.diffusion.schedules import scaled_linear

    chain = read_scheduler(tiny.SCHEDULER, "F")
    ends = chain.schedule_options["beta_start"], chain.schedule_options["beta_end"]
    betas = np.linspace(*(end**0.5 for end in ends), 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    log_snr = scaled_linear(**chain.schedule_options)(np.float32(0.5))
    assert abs(float(log_snr) - np.log(alpha_bar[499] / (1 - alpha_bar[499]))) < 1e-4
