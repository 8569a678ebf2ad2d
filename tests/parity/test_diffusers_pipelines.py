"""Exported folders in diffusers' own pipelines: as many calls, the same latents, the same pixels.

Needs the extra `parity`, and is skipped without it.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny  # noqa: E402
from etils import epath  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from guided_distill.applications import text_to_image  # noqa: E402
from guided_distill.applications.text_to_image import load_text_to_image  # noqa: E402
from guided_distill.config import Model  # noqa: E402
from guided_distill.diffusion import samplers  # noqa: E402
from guided_distill.diffusion.guidance import guidance_scale  # noqa: E402
from guided_distill.diffusion.process import prediction_from  # noqa: E402
from guided_distill.diffusion.schedules import scaled_linear, timestep_index  # noqa: E402
from guided_distill.formats.diffusers_configs import (  # noqa: E402
    SchedulerSettings,
    read_denoiser,
    scheduler_config,
    visited_by_diffusers,
)
from guided_distill.formats.diffusers_export import export_diffusers  # noqa: E402
from guided_distill.formats.import_model import import_model  # noqa: E402
from guided_distill.formats.torch_layout import torch_shapes  # noqa: E402
from guided_distill.models.outline import Outline  # noqa: E402
from guided_distill.runs.trained import load_finished, network_of  # noqa: E402
from guided_distill.sampling.labels import of_labels  # noqa: E402
from guided_distill.sampling.request import Request  # noqa: E402
from guided_distill.sampling.sample import sample  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

W, PROMPT, COUNT = 6.5, "a cat", 2
PROMPTS = [PROMPT, "two dogs"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()


def made_by_diffusers(folder, *, inpaint=False, variant=None):
    """A folder that diffusers and transformers wrote, of random weights of their own."""
    torch.manual_seed(0)
    tiny.write_tokenizer(epath.Path(folder) / "words")
    kind = (
        diffusers.StableDiffusionInpaintPipeline if inpaint else diffusers.StableDiffusionPipeline
    )
    unet = {**tiny.UNET, "in_channels": 2 * tiny.LATENTS + 1} if inpaint else tiny.UNET
    pipe = kind(
        unet=diffusers.UNet2DConditionModel.from_config(unet),
        vae=diffusers.AutoencoderKL.from_config(tiny.VAE),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**tiny.TEXT)),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        scheduler=diffusers.PNDMScheduler.from_config(tiny.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe = pipe.to(torch.float16) if variant == "fp16" else pipe
    pipe.save_pretrained(folder / "pipeline", variant=variant)
    return folder / "pipeline"


def by_its_card(folder):
    """The image and the pipeline that the lines of an exported folder's README make."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    made = {}
    exec(code.replace("FOLDER", str(folder)), made)
    return made["image"], made["pipe"]


def imported(source, workdir):
    import_model(str(source), epath.Path(workdir))
    return epath.Path(workdir)


def exported(run, stage, out):
    export_diffusers(run, epath.Path(out), stages=(stage,))
    return out


def load(kind, folder, **parts):
    pipe = kind.from_pretrained(folder, safety_checker=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Calls:
    """How many times a pipeline calls its U-Net, on how many examples each."""

    def __init__(self, pipe):
        self.batches = []
        pipe.unet.register_forward_pre_hook(
            lambda module, inputs, named: self.batches.append(len(inputs[0])), with_kwargs=True
        )


def channels_last(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def channels_first(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def noise(seed=0):
    shape = (COUNT, tiny.SIZE, tiny.SIZE, tiny.LATENTS)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def text_of(pipe):
    prompts, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    return prompts.detach().numpy()


def assert_near(theirs, ours):
    assert ours.std() > 0.1
    assert np.abs(channels_last(theirs) - ours).max() < 1e-3


WIDE = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "sample_size": 64}
SD1 = {
    **tiny.UNET,
    **WIDE,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
}
SD2 = {
    **SD1,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
DIT_XL = {**tiny.DIT, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}


@pytest.mark.parametrize(
    ("kind", "config", "condition"),
    [
        ("UNet2DConditionModel", SD1, {"text": (77, 768)}),
        ("UNet2DConditionModel", SD2, {"text": (77, 1024)}),
        (
            "UNet2DConditionModel",
            {**SD1, "in_channels": 9},
            {"text": (77, 768), "inpaint": (64, 64, 5)},
        ),
        ("DiTTransformer2DModel", DIT_XL | {"num_embeds_ada_norm": 1000}, {"label": ()}),
    ],
    ids=["SD 1", "SD 2", "in-painting", "DiT-XL/2"],
)
@pytest.mark.parametrize("takes_w", [False, True])
def test_published_sizes_have_diffusers_names_and_shapes(kind, config, condition, takes_w):
    denoiser = read_denoiser(config, "F")
    if takes_w and denoiser.name == "dit":
        pytest.skip("diffusers has no DiT that takes w")
    network = network_of(
        Model(name=denoiser.name, options=dict(denoiser.options)),
        Outline(denoiser.data_shape, denoiser.num_classes, condition),
    )
    network = network.conditioned_on_w() if takes_w else network
    ours = torch_shapes(jax.eval_shape(network.init, jax.random.key(0)))
    config = {**config, "time_cond_proj_dim": 256} if takes_w else config
    with torch.device("meta"):
        theirs = getattr(diffusers, kind).from_config(config).state_dict()
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return imported(made_by_diffusers(folder), folder / "run")


@pytest.fixture(scope="module")
def inpaint_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inpaint")
    return imported(made_by_diffusers(folder, inpaint=True), folder / "run")


@pytest.fixture(scope="module", params=["eps", "v", "x"])
def student(request, run, tmp_path_factory):
    """A student that takes any number of steps, and the folder that it was exported to."""
    stage = tiny.add_student(run, stage="guidance", parameterization=request.param)
    out = exported(run, stage, tmp_path_factory.mktemp(request.param) / "out")
    return load_finished(run / stage), out


def test_in_and_out_without_training_gives_the_same_pixels(run, tmp_path):
    def pixels(folder):
        pipe = load(diffusers.StableDiffusionPipeline, folder)
        drawn = pipe(
            PROMPT,
            num_inference_steps=5,
            guidance_scale=7.5,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images
        return np.round(255 * drawn).astype(int)

    before, after = pixels(run.parent / "pipeline"), pixels(exported(run, "teacher", tmp_path))
    assert before.std() > 5
    assert np.abs(before - after).max() <= 1


def test_a_student_calls_its_unet_once_a_step_and_equals_our_sampler(student):
    trained, folder = student
    pipe = load(diffusers.StableDiffusionPipeline, folder)
    text = text_of(pipe)
    for num_steps in (1, 2, 4, 8, 16):
        calls = Calls(pipe)
        theirs = pipe(
            prompt_embeds=torch.from_numpy(text),
            latents=channels_first(noise()),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale(W),
            output_type="latent",
        ).images
        assert calls.batches == [COUNT] * num_steps
        ours = sample(trained, Request({"text": text}, W, noise=noise(), num_steps=num_steps))
        assert_near(theirs, ours)


def test_a_folder_in_half_precision_goes_out_as_its_card_loads_it(tmp_path):
    source = made_by_diffusers(tmp_path, variant="fp16")
    assert not list(source.glob("*/model.safetensors"))
    run = imported(source, tmp_path / "run")
    stage = tiny.add_student(run, num_steps=2, sampler="ddim")
    image, pipe = by_its_card(exported(run, stage, tmp_path / "out"))
    assert np.asarray(image).std() > 5
    theirs = load(diffusers.StableDiffusionPipeline, source, variant="fp16")
    for part in ("vae", "text_encoder"):
        expected = getattr(theirs, part).state_dict()
        for name, tensor in getattr(pipe, part).state_dict().items():
            np.testing.assert_array_equal(tensor, expected[name])


def test_where_schedulers_call_a_network():
    for num_steps in (1, 2, 4, 16, 48, 61, 103, 250, 512):
        config = scheduler_config(
            SchedulerSettings("eps", "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
            num_steps=num_steps,
        )
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps.tolist() == visited_by_diffusers(num_steps)


@pytest.mark.parametrize("num_steps", [16, 48])
def test_steps_that_do_not_divide_1000(run, tmp_path, num_steps):
    stage = tiny.add_student(run, num_steps=num_steps, sampler="ddim")
    folder = exported(run, stage, tmp_path / "out")
    (steps,) = re.findall(
        r"^    ((?:timesteps|num_inference_steps)=.*),$", card(folder), re.MULTILINE
    )
    pipe = load(diffusers.StableDiffusionPipeline, folder)
    calls, text = Calls(pipe), text_of(pipe)
    theirs = pipe(
        prompt_embeds=torch.from_numpy(text),
        latents=channels_first(noise()),
        guidance_scale=guidance_scale(W),
        output_type="latent",
        **eval(f"dict({steps})"),
    ).images
    assert calls.batches == [COUNT] * num_steps
    trained = load_finished(run / stage)
    assert_near(theirs, sample(trained, Request({"text": text}, W, noise=noise())))


def card(folder):
    return (folder / "README.md").read_text()


def half_mask():
    """White, where to paint, on the right."""
    mask = np.zeros((4 * tiny.SIZE,) * 2, np.uint8)
    mask[:, 2 * tiny.SIZE :] = 255
    return Image.fromarray(mask)


class PixelsAsLatents:
    """In the place of an autoencoder: the pipelines are given latents and answer latents."""

    def to_latents(self, images):
        return images

    def to_images(self, latents):
        return latents


@pytest.fixture(scope="module")
def eps_student(run, tmp_path_factory):
    stage = tiny.add_student(run, stage="guidance")
    out = exported(run, stage, tmp_path_factory.mktemp("eps_student") / "out")
    return replace(load_text_to_image(run / stage), space=PixelsAsLatents()), out


@pytest.mark.parametrize(("num_steps", "strength"), [(4, 0.5), (8, 0.75), (2, 1.0)])
def test_image_to_image_equals_our_editing(eps_student, num_steps, strength, monkeypatch):
    model, folder = eps_student
    pipe = load(diffusers.StableDiffusionImg2ImgPipeline, folder)
    calls = Calls(pipe)
    theirs = pipe(
        PROMPTS,
        image=channels_first(noise(1)),
        strength=strength,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale(W),
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images
    shape = (COUNT, tiny.LATENTS, tiny.SIZE, tiny.SIZE)
    eps = channels_last(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    monkeypatch.setattr(text_to_image, "initial_noise", lambda *about, **seed: eps)
    ours = text_to_image.edit(model, noise(1), PROMPTS, strength=strength, w=W, num_steps=num_steps)
    assert calls.batches == [COUNT] * ours.steps_run
    assert_near(theirs, ours.images)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_in_painting_by_a_plain_student_equals_ours(eps_student, num_steps, monkeypatch):
    """The pipeline puts the known half back after every step, at the next step's noise."""
    model, folder = eps_student
    pipe = load(diffusers.StableDiffusionInpaintPipeline, folder)
    calls = Calls(pipe)
    theirs = pipe(
        PROMPTS,
        image=channels_first(noise(1)),
        mask_image=half_mask(),
        masked_image_latents=channels_first(noise(1)),
        latents=channels_first(noise()),
        strength=1.0,
        height=4 * tiny.SIZE,
        width=4 * tiny.SIZE,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale(W),
        output_type="latent",
    ).images
    assert calls.batches == [COUNT] * num_steps
    monkeypatch.setattr(text_to_image, "initial_noise", lambda *about, **seed: noise())
    masks = small_mask()[..., 0] > 0
    assert_near(
        theirs,
        text_to_image.inpaint(model, noise(1), masks, PROMPTS, w=W, num_steps=num_steps),
    )


def small_mask():
    mask = np.zeros((COUNT, tiny.SIZE, tiny.SIZE, 1), np.float32)
    mask[:, :, tiny.SIZE // 2 :] = 1
    return mask


def test_in_painting_equals_our_sampler(inpaint_run, tmp_path):
    stage = tiny.add_student(inpaint_run, stage="guidance")
    trained = load_finished(inpaint_run / stage)
    pipe = load(diffusers.StableDiffusionInpaintPipeline, exported(inpaint_run, stage, tmp_path))
    text = text_of(pipe)
    beside = np.concatenate([small_mask(), noise(5)], axis=-1)
    for num_steps in (1, 2, 4, 8):
        calls = Calls(pipe)
        theirs = pipe(
            prompt_embeds=torch.from_numpy(text),
            image=torch.zeros((COUNT, 3, 4 * tiny.SIZE, 4 * tiny.SIZE)),
            mask_image=half_mask(),
            masked_image_latents=channels_first(noise(5)),
            latents=channels_first(noise()),
            strength=1.0,
            height=4 * tiny.SIZE,
            width=4 * tiny.SIZE,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale(W),
            output_type="latent",
        ).images
        assert calls.batches == [COUNT] * num_steps
        ours = sample(
            trained,
            Request({"text": text, "inpaint": beside}, W, noise=noise(), num_steps=num_steps),
        )
        assert_near(theirs, ours)


def test_labels_go_into_the_stock_pipeline_as_prompt_embeddings(tmp_path):
    run = imported(tiny.write_pipeline(tmp_path / "labels", num_classes=3), tmp_path / "run")
    stage = tiny.add_student(run, num_steps=2, sampler="ddim")
    folder = exported(run, stage, tmp_path / "out")
    without_text = {"text_encoder": None, "tokenizer": None}
    pipe = load(diffusers.StableDiffusionPipeline, folder, **without_text)
    (weights,) = (folder / "class_embedder").glob("*.safetensors")
    table = load_file(weights)["embedding.weight"]
    labels = [2, 0]
    theirs = pipe(
        prompt_embeds=table[labels][:, None],
        latents=channels_first(noise()),
        num_inference_steps=2,
        guidance_scale=guidance_scale(W),
        output_type="latent",
    ).images
    condition = of_labels(labels)
    trained = load_finished(run / stage)
    assert_near(theirs, sample(trained, Request(condition, W, noise=noise())))


def test_a_dit_teacher_goes_into_its_pipeline(tmp_path):
    run = imported(tiny.write_dit(tmp_path / "dit"), tmp_path / "run")
    pipe = load(diffusers.DiTPipeline, exported(run, "teacher", tmp_path / "out"))
    assert pipe([0], num_inference_steps=2, guidance_scale=1.0, output_type="np").images.std() > 0


@pytest.fixture(scope="module")
def stochastic_folder(run, tmp_path_factory):
    stage = tiny.add_student(run, num_steps=4, sampler="stochastic")
    return exported(run, stage, tmp_path_factory.mktemp("stochastic") / "out")


def test_a_stochastic_student_is_loaded_saved_and_loaded_again(stochastic_folder, tmp_path):
    def drawn(pipe):
        pipe.set_progress_bar_config(disable=True)
        calls = Calls(pipe)
        latents = pipe(
            PROMPT,
            num_inference_steps=4,
            guidance_scale=guidance_scale(W),
            output_type="latent",
            generator=torch.Generator().manual_seed(2),
        ).images
        assert calls.batches == [1] * 4
        return latents

    _, pipe = by_its_card(stochastic_folder)
    expected, kind = drawn(pipe), diffusers.StableDiffusionPipeline
    pipe.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(drawn(again), expected, rtol=0, atol=0)
    again.save_pretrained(tmp_path / "twice")
    for folder in (stochastic_folder, tmp_path / "again", tmp_path / "twice"):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            kind.from_pretrained(folder)
        kind.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="pass num_inference_steps=4"):
        again(PROMPT)
    inpaint = load(diffusers.StableDiffusionImg2ImgPipeline, folder, trust_remote_code=True)
    calls = Calls(inpaint)
    inpaint(
        PROMPT,
        image=channels_first(noise(1))[:1],
        strength=0.5,
        num_inference_steps=4,
        output_type="latent",
    )
    assert calls.batches == [1] * 2


def test_the_stochastic_scheduler_takes_our_sampler_steps(stochastic_folder, monkeypatch):
    """One and the same network for both: x as a function of z and t, from a closed form."""
    pipe = load(diffusers.StableDiffusionPipeline, stochastic_folder, trust_remote_code=True)
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config, trained_steps=None)
    schedule = scaled_linear(beta_start=0.00085, beta_end=0.012)

    def eps_of(z, index):
        return 0.6 * z + 0.001 * index

    def predict(z, t):
        eps = eps_of(z, timestep_index(t)[:, None, None, None])
        return prediction_from(eps, source="eps", z=z, log_snr=schedule(t))

    monkeypatch.setattr(samplers, "_step_noise", lambda keys, i, z: jnp.cos(noise(9) + i))
    keys = samplers.step_keys(jax.random.key(0), jnp.arange(COUNT))
    for num_steps in (1, 2, 4, 8):
        ours = samplers.stochastic(predict, schedule, noise(), keys, jnp.int32(num_steps))
        scheduler.set_timesteps(num_steps)
        z = torch.from_numpy(noise())
        for step, index in enumerate(scheduler.timesteps):
            i = num_steps - step
            drawn = torch.cos(torch.from_numpy(noise(9)) + i)
            z = scheduler.step(eps_of(z, int(index)), index, z, variance_noise=drawn).prev_sample
        np.testing.assert_allclose(z.numpy(), ours, rtol=1e-3, atol=1e-3)
