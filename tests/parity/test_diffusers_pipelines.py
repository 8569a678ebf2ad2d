"""Exported folders in diffusers' own pipelines: as many calls, the same latents, the same pixels.

Needs the extra `parity`, and is skipped without it.
"""

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

from guided_distill import sampling  # noqa: E402
from guided_distill.diffusion import samplers  # noqa: E402
from guided_distill.diffusion.guidance import guidance_scale  # noqa: E402
from guided_distill.diffusion.process import ddim_step  # noqa: E402
from guided_distill.diffusion.schedules import SCHEDULES  # noqa: E402
from guided_distill.interop.diffusers_export import export_diffusers  # noqa: E402
from guided_distill.interop.import_model import import_model  # noqa: E402
from guided_distill.training.trained import load_finished  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

W, PROMPT, COUNT = 6.5, "a cat", 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()


def made_by_diffusers(folder, *, inpaint=False):
    """A folder that diffusers and transformers wrote, of random weights of their own."""
    torch.manual_seed(0)
    tiny.write_tokenizer(epath.Path(folder) / "words")
    kind = diffusers.StableDiffusionInpaintPipeline if inpaint else diffusers.StableDiffusionPipeline
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
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def imported(source, workdir):
    import_model(str(source), epath.Path(workdir))
    return epath.Path(workdir)


def exported(run, stage, out):
    export_diffusers(run, epath.Path(out), stages=(stage,))
    return out


def load(kind, folder):
    pipe = kind.from_pretrained(folder, safety_checker=None)
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
    prompts, _ = pipe.encode_prompt([PROMPT, "two dogs"], "cpu", 1, False)
    return prompts.detach().numpy()


def assert_near(theirs, ours):
    assert ours.std() > 0.1
    assert np.abs(channels_last(theirs) - ours).max() < 1e-3


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
    for num_steps in (1, 2, 4, 8):
        calls = Calls(pipe)
        theirs = pipe(
            prompt_embeds=torch.from_numpy(text),
            latents=channels_first(noise()),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale(W),
            output_type="latent",
        ).images
        assert calls.batches == [COUNT] * num_steps
        ours = sampling.sample(
            trained, condition={"text": text}, w=W, noise=noise(), num_steps=num_steps
        )
        assert_near(theirs, ours)


def test_steps_that_do_not_divide_1000(run, tmp_path):
    stage = tiny.add_student(run, num_steps=16, sampler="ddim")
    pipe = load(diffusers.StableDiffusionPipeline, exported(run, stage, tmp_path))
    calls, text = Calls(pipe), text_of(pipe)
    theirs = pipe(
        prompt_embeds=torch.from_numpy(text),
        latents=channels_first(noise()),
        num_inference_steps=16,
        guidance_scale=guidance_scale(W),
        output_type="latent",
    ).images
    assert calls.batches == [COUNT] * 16
    trained = load_finished(run / stage)
    assert_near(theirs, sampling.sample(trained, condition={"text": text}, w=W, noise=noise()))


def steps_from(trained, z, condition, *, first, num_steps):
    """Our own steps first, first - 1 ... 1 of num_steps, which pipelines run from a noised image."""
    network = trained.description.network()
    denoiser = network.denoiser(trained.params)
    predict = jax.jit(denoiser.predict)
    for i in range(first, 0, -1):
        t, s = (jnp.full((len(z),), k / num_steps, jnp.float32) for k in (i, i - 1))
        prediction = predict(z, t, condition, jnp.full((len(z),), W))
        z = prediction.x if i == 1 else ddim_step(prediction, network.schedule(s))
    return np.asarray(z)


def noised(trained, x, eps, t):
    alpha_bar = 1 / (1 + np.exp(-np.asarray(trained.description.network().schedule(jnp.float32(t)))))
    return np.sqrt(alpha_bar) * x + np.sqrt(1 - alpha_bar) * eps


@pytest.mark.parametrize(("num_steps", "strength"), [(4, 0.5), (8, 0.75), (2, 1.0)])
def test_image_to_image_equals_our_steps(run, tmp_path, num_steps, strength):
    stage = tiny.add_student(run, num_steps=num_steps, sampler="ddim")
    trained = load_finished(run / stage)
    pipe = load(diffusers.StableDiffusionImg2ImgPipeline, exported(run, stage, tmp_path))
    calls, text = Calls(pipe), text_of(pipe)
    theirs = pipe(
        prompt_embeds=torch.from_numpy(text),
        image=channels_first(noise(1)),
        strength=strength,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale(W),
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images
    first = int(num_steps * strength)
    assert calls.batches == [COUNT] * first
    shape = (COUNT, tiny.LATENTS, tiny.SIZE, tiny.SIZE)
    eps = channels_last(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    z = noised(trained, noise(1), eps, first / num_steps)
    ours = steps_from(trained, z, {"text": text}, first=first, num_steps=num_steps)
    assert_near(theirs, ours)


def picture_and_mask():
    size = 4 * tiny.SIZE
    picture = torch.from_numpy(
        np.random.default_rng(2).uniform(-1, 1, (COUNT, 3, size, size)).astype(np.float32)
    )
    mask = np.zeros((size, size), np.uint8)
    mask[:, size // 2 :] = 255
    return picture, Image.fromarray(mask)


def small_mask():
    mask = np.zeros((COUNT, tiny.SIZE, tiny.SIZE, 1), np.float32)
    mask[:, :, tiny.SIZE // 2 :] = 1
    return mask


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_in_painting_equals_our_sampler(inpaint_run, tmp_path, num_steps):
    stage = tiny.add_student(inpaint_run, num_steps=num_steps, sampler="ddim")
    pipe = load(diffusers.StableDiffusionInpaintPipeline, exported(inpaint_run, stage, tmp_path))
    calls, text = Calls(pipe), text_of(pipe)
    picture, mask = picture_and_mask()
    theirs = pipe(
        prompt_embeds=torch.from_numpy(text),
        image=picture,
        mask_image=mask,
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
    beside = np.concatenate([small_mask(), noise(5)], axis=-1)
    ours = sampling.sample(
        load_finished(inpaint_run / stage),
        condition={"text": text, "inpaint": beside},
        w=W,
        noise=noise(),
    )
    assert_near(theirs, ours)


def test_the_stochastic_scheduler_takes_our_sampler_steps(run, tmp_path, monkeypatch):
    """One and the same network for both: x as a function of z and t, from a closed form."""
    stage = tiny.add_student(run, num_steps=4, sampler="stochastic")
    pipe = load(diffusers.StableDiffusionPipeline, exported(run, stage, tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    from scheduling_guided_distill import GuidedDistillStochasticScheduler

    scheduler = GuidedDistillStochasticScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = scheduler
    calls = Calls(pipe)
    pipe(PROMPT, num_inference_steps=4, guidance_scale=guidance_scale(W), output_type="latent")
    assert calls.batches == [1] * 4

    schedule = SCHEDULES["scaled_linear"](beta_start=0.00085, beta_end=0.012)

    def eps_of(z, index):
        return 0.6 * z + 0.001 * index

    def predict(z, t):
        from guided_distill.diffusion.process import prediction_from
        from guided_distill.diffusion.schedules import timestep_index

        eps = eps_of(z, timestep_index(t)[:, None, None, None])
        return prediction_from(eps, source="eps", z=z, log_snr=schedule(t))

    keys = samplers.sample_keys(jax.random.key(0), jnp.arange(COUNT))
    for num_steps in (1, 2, 4, 8):
        drawn = []
        monkeypatch.setattr(samplers, "_step_noise", lambda keys, i, z: jnp.cos(7 * z + i))
        ours = samplers.stochastic(predict, schedule, noise(), keys, jnp.int32(num_steps))
        scheduler.set_timesteps(num_steps)
        z = torch.from_numpy(noise())
        for step, index in enumerate(scheduler.timesteps):
            i = num_steps - step
            drawn = torch.cos(7 * z + i)
            z = scheduler.step(eps_of(z, int(index)), index, z, variance_noise=drawn).prev_sample
        np.testing.assert_allclose(z.numpy(), ours, rtol=2e-4, atol=2e-4)
