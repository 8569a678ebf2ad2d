"""A run of its own latent space and MiniLM's layout in StableDiffusionPipeline: the same pixels.

Needs the extra `parity`, and is skipped without it.
"""

import jax
import numpy as np
import pytest

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from etils import epath  # noqa: E402
from text_models import write_minilm  # noqa: E402

from guided_distill import cli  # noqa: E402
from guided_distill.applications.text_to_image import generate, load_text_to_image  # noqa: E402
from guided_distill.diffusion.guidance import guidance_scale  # noqa: E402
from guided_distill.formats.diffusers_export import export_diffusers  # noqa: E402
from guided_distill.sampling.sample import initial_noise  # noqa: E402
from guided_distill.training.checkpoints import StageCheckpoints  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

SIDE, STAGE, PROMPTS, W = 16, "halving_ddim_2", ["red apple", "two apples"], 1.5


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A small run, whose student then gets random weights: so little training changes hardly anything."""
    folder = tmp_path_factory.mktemp("own")
    write_minilm(folder / "minilm")
    count = 80
    np.savez(
        folder / "drawings.npz",
        image=np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8),
        caption=np.array(PROMPTS * (count // 2)),
    )
    changes = {
        "data.name": f"npz:{folder / 'drawings.npz'}",
        "data.image_size": SIDE,
        "data.text_encoder": f"minilm:{folder / 'minilm'}",
        "model.options.cross_attention_dim": 24,
    }
    path = epath.Path(folder / "run")
    arguments = [f"--config.{key}={value}" for key, value in changes.items()]
    command = ["train", "--config=configs/emoji.py:runlocal", "--workdir", str(path)]
    assert cli.main([*command, *arguments]) == 0
    trained = load_text_to_image(path / STAGE).trained
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), trained.params
    )
    (path / STAGE / "checkpoints").rmtree()
    with StageCheckpoints(path / STAGE, keep=1) as checkpoints:
        checkpoints.save_result(trained.step, params, about=trained.description.to_json())
        checkpoints.wait()
    return path


def test_the_exported_student_draws_what_ours_draws(workdir, tmp_path):
    out = epath.Path(tmp_path / "out")
    export_diffusers(workdir, out, stages=[STAGE])
    model = load_text_to_image(workdir / STAGE)
    expected = generate(model, PROMPTS, w=W, seed=0)
    noise = initial_noise(model.trained.description, len(PROMPTS), seed=0)

    torch.set_num_threads(1)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(out))
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    found = pipe(
        PROMPTS,
        num_inference_steps=2,
        guidance_scale=guidance_scale(W),
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
    ).images
    assert len(calls) == 2
    np.testing.assert_allclose(2.0 * found - 1.0, expected, atol=1e-3)
    assert np.abs(expected[0] - expected[1]).max() > 0.1
