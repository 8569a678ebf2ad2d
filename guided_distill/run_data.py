"""The data that a run trains on: those of its config, or their latents from its own autoencoder."""

import zlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from guided_distill import draws
from guided_distill.config import AUTOENCODER, Experiment
from guided_distill.data import sources
from guided_distill.data.encode import EncodeRequest, check_image_shape, encode_data
from guided_distill.data.outline import Outline, check_expected, expected_outline, outline_of
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.formats.companions import COMPANIONS
from guided_distill.formats.diffusers_autoencoder import autoencoder_config
from guided_distill.formats.diffusers_configs import (
    PARAMETERIZATIONS,
    SchedulerSettings,
    scheduler_config,
)
from guided_distill.formats.diffusers_folder import (
    DIFFUSERS_VERSION,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    WEIGHTS,
    write_component,
)
from guided_distill.formats.json_files import write_json
from guided_distill.formats.torch_layout import to_tensors
from guided_distill.models.registry import Params, check_module, check_options
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL
from guided_distill.objectives.autoencoder import NOT_OPTIONS, Autoencoder, autoencoder_loss
from guided_distill.sampling.latents import BATCH_SIZE, LatentSpace, autoencoder_folder
from guided_distill.text.registry import copy_text_encoder, load_text_encoder
from guided_distill.training.job import Job, Monitoring
from guided_distill.training.mesh import data_mesh
from guided_distill.training.processes import first_alone
from guided_distill.training.session import train_in
from guided_distill.training.state import make_optimizer
from guided_distill.training.step import make_train_step

SCALE_EXAMPLES = 4096
"""Number of images whose latents determine the scaling factor."""

_SHARD = 4096


def open_data(experiment: Experiment) -> Source:
    """Open the config's data. Raises UserError if they don't match the config."""
    data = experiment.data
    source = sources.load_source(data.name, image_size=data.image_size, seed=experiment.seed)
    if data.channels not in (None, source.shape[-1]):
        raise UserError(
            f"config.data.channels is {data.channels}, but {data.name} has {source.shape[-1]}: "
            f"use images with that number of channels, or change config.data.channels"
        )
    check_expected(data, source)
    if source.latent and data.flip:
        raise UserError(
            "config.data.flip would mirror latents, but these aren't the latents of mirrored images: set "
            "it to False, and let `guided-distill encode --flip` encode both"
        )
    if data.text_encoder and not experiment.autoencoder.steps:
        raise UserError(
            "config.data.text_encoder is for a run with an autoencoder: set config.autoencoder.steps, or "
            "let `guided-distill encode` embed the texts and name its folder in config.data.name"
        )
    if data.text_encoder and source.captions is None:
        raise UserError(
            f"config.data.text_encoder is set, but {data.name} has no captions: set it to None, or give "
            f"data that have them"
        )
    return source


def outline_of_latents(source: Source, experiment: Experiment) -> Source:
    """The outline of `latents_of`, to check a network before anything is trained.

    Raises UserError if the autoencoder's options, the images or the text encoder don't fit.
    """
    module = check_autoencoder(experiment.autoencoder, source)
    images = jax.ShapeDtypeStruct((1, *source.shape), jnp.float32)
    latents = check_module(
        "config.autoencoder.options",
        module,
        f"autoencoder of {source.name}",
        lambda: jax.eval_shape(
            lambda key, images: module.init_with_output(key, images, method="to_latents")[0],
            jax.eval_shape(jax.random.key, 0),
            images,
        ),
        shape=source.shape,
    )
    text_encoder = experiment.data.text_encoder
    condition_shapes: dict[str, tuple[int, ...]] = {"label": ()}
    if text_encoder:
        condition_shapes = {"text": load_text_encoder(text_encoder).shape}
    return replace(
        source,
        shape=latents.shape[1:],
        class_names=() if text_encoder else source.class_names,
        condition_shapes=condition_shapes,
        latent=True,
    )


def outline_for(experiment: Experiment) -> Outline:
    """The outline of the data that a run's denoisers train on, from the config or else from the data."""
    if expected := expected_outline(experiment.data):
        return expected
    source = open_data(experiment)
    return outline_of(
        outline_of_latents(source, experiment) if experiment.autoencoder.steps else source
    )


def has_autoencoder(workdir: epath.Path) -> bool:
    """Whether the run has trained its autoencoder."""
    return (workdir / COMPANIONS / MODEL_INDEX).exists()


def latents_of(
    source: Source, experiment: Experiment, workdir: epath.Path, monitoring: Monitoring
) -> Source:
    """Return the latents that the run's denoisers train on.

    Trains the run's autoencoder first unless it is finished, then encodes the data, captions included.
    Raises UserError if the autoencoder is unfinished and config.stage is another stage.
    """
    data = experiment.data
    if not has_autoencoder(workdir):
        if experiment.stage not in ("all", AUTOENCODER):
            raise UserError(
                f"{workdir} has no autoencoder yet, and the next stage needs it: train it with "
                f"--config.stage={AUTOENCODER}, or everything with --config.stage=all"
            )
        if jax.process_count() > 1:
            raise UserError(
                f"{workdir} has no autoencoder yet, and one process trains it: run one first, with "
                f"--config.stage={AUTOENCODER}, then go on with {jax.process_count()} processes"
            )
        train_autoencoder(experiment, source, workdir, monitoring)
    folder = workdir / "latents"
    request = EncodeRequest(
        data=data.name,
        image_size=data.image_size,
        text_encoder=data.text_encoder,
        mirrored=data.flip,
        batch_size=BATCH_SIZE,
        shard_size=_SHARD,
    )
    first_alone(
        lambda: encode_data(folder, request, autoencoder=autoencoder_folder(workdir)),
    )
    return sources.load_source(f"encoded:{folder}")


def train_autoencoder(
    experiment: Experiment, source: Source, workdir: epath.Path, monitoring: Monitoring
) -> None:
    """Train the run's autoencoder on the images of `source`, and write it to its folder.

    With its scaling factor, the latents of the training images have a standard deviation of 1. Raises
    UserError as training does, and if the data aren't images of the autoencoder's size.
    """
    settings = experiment.autoencoder
    module = check_autoencoder(settings, source)
    seed = zlib.crc32(f"{experiment.seed}/{AUTOENCODER}".encode())
    mesh = data_mesh()
    init_key, loss_key = jax.random.split(draws.key_of(seed))
    job = Job(
        workdir / AUTOENCODER,
        title=AUTOENCODER,
        about={"stage": AUTOENCODER},
        settings=settings,
        total_steps=settings.steps,
        seed=seed,
        key=loss_key,
        cadence=experiment.cadence,
        mesh=mesh,
        monitoring=monitoring,
    )

    def initial() -> Params:
        return jax.jit(module.init)(init_key, jnp.zeros((1, *source.shape)))["params"]

    optimizer = make_optimizer(settings, steps=settings.steps)
    step = make_train_step(
        lambda params, frozen, batch, keys: autoencoder_loss(
            module, params, batch["image"], keys, kl_weight=settings.kl_weight
        ),
        optimizer,
        ema_decay=settings.ema_decay,
        mesh=mesh,
        accumulation=settings.accumulation,
    )
    state = train_in(
        job,
        source,
        (step, optimizer),
        shapes=jax.eval_shape(initial),
        initial=initial,
        frozen={},
        flip=experiment.data.flip,
    )
    factor = _scaling_factor(module, state.result, source)
    _write_companions(
        workdir / COMPANIONS, experiment, module.clone(scaling_factor=factor), state.result, source
    )


def _write_companions(
    folder: epath.Path,
    experiment: Experiment,
    module: AutoencoderKL,
    params: Params,
    source: Source,
) -> None:
    """Write the companions of the run's denoisers in diffusers' layout; the index comes last."""
    model, text_encoder = experiment.model, experiment.data.text_encoder
    write_component(
        folder / "vae",
        autoencoder_config(module, sample_size=source.shape[0]),
        to_tensors(params),
        WEIGHTS,
    )
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if model.schedule != "cosine" and model.parameterization in PARAMETERIZATIONS.values():
        chain = SchedulerSettings(model.parameterization, model.schedule, model.schedule_options)
        scheduler = scheduler_config(chain, num_steps=None)
        write_json(folder / "scheduler" / SCHEDULER_CONFIG, scheduler)
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if text_encoder:
        index |= copy_text_encoder(text_encoder, folder)
    write_json(folder / MODEL_INDEX, index)


def check_autoencoder(settings: Autoencoder, source: Source) -> AutoencoderKL:
    """The autoencoder of a config. Raises UserError if its options and the images don't fit."""
    check_options("config.autoencoder.options", settings.options, AutoencoderKL, fixed=NOT_OPTIONS)
    module = AutoencoderKL(**settings.options, image_channels=source.shape[-1])
    check_image_shape(module, source)
    return module


def _scaling_factor(module: AutoencoderKL, params: Params, source: Source) -> float:
    unscaled = LatentSpace(module.clone(scaling_factor=1.0), params)
    chunks = source.chunks(SCALE_EXAMPLES)
    return float(1.0 / np.std(np.concatenate([unscaled.to_latents(x["image"]) for x in chunks])))
