"""A diffusers scheduler for students of the stochastic sampler; needs only torch and diffusers.

`guided-distill export` copies this file into the folder `scheduler` of such a student, from which
`from_pretrained` loads it with `trust_remote_code=True`.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

CLEAN = -1
"""The index that stands for data without noise."""


class GuidedDistillStochasticScheduler(SchedulerMixin, ConfigMixin):
    """A DDIM step of twice the length, then noise for one step back: the sampler of Meng et al. 2023.

    With N steps, the network is called at indices round(1000 n / N) - 1, n = N ... 1. Each DDIM step
    leads to the index after the next, and fresh noise leads back to the next; the last step leads to
    clean data.
    """

    # The name of this file, by which a saved pipeline finds it.
    __module__ = "scheduling_guided_distill"

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        trained_steps=None,
    ):
        """trained_steps: the only number of steps to sample with; None for any."""
        power = {"linear": 1.0, "scaled_linear": 0.5}[beta_schedule]
        ends = beta_start**power, beta_end**power
        betas = np.linspace(*ends, num_train_timesteps) ** (1 / power)
        self.alphas_cumprod = torch.tensor(np.cumprod(1 - betas), dtype=torch.float32)
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def set_timesteps(self, num_inference_steps, device=None):
        """Set the indices of `num_inference_steps` steps, noisiest first."""
        if num_inference_steps != (self.config.trained_steps or num_inference_steps):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}, but this student was trained for "
                f"{self.config.trained_steps} steps: pass num_inference_steps="
                f"{self.config.trained_steps}"
            )
        length = self.config.num_train_timesteps
        ends = range(num_inference_steps, -1, -1)
        self.num_inference_steps = num_inference_steps
        self._indices = [round(length * n / num_inference_steps) - 1 for n in ends]
        self.timesteps = torch.tensor(self._indices[:-1], device=device)

    def scale_model_input(self, sample, timestep=None):
        """The sample itself."""
        return sample

    def add_noise(self, original_samples, noise, timesteps):
        """Clean data at the noise levels of the indices `timesteps` [B]."""
        signal = self.alphas_cumprod.to(timesteps.device)[timesteps]
        signal = signal.to(original_samples).reshape(-1, *[1] * (original_samples.ndim - 1))
        return signal.sqrt() * original_samples + (1 - signal).sqrt() * noise

    def step(
        self,
        model_output,
        timestep,
        sample,
        generator=None,
        variance_noise=None,
        return_dict=True,
    ):
        """The sample at the next index. variance_noise: None to draw the fresh noise here."""
        place = self._indices.index(int(timestep))
        following, after = [*self._indices, CLEAN][place + 1 : place + 3]
        x, eps = self._prediction(model_output.float(), sample.float(), self._signal(timestep))
        jumped = self._signal(after)
        z = jumped.sqrt() * x + (1 - jumped).sqrt() * eps
        if following != CLEAN:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    z.shape, generator=generator, device=z.device, dtype=z.dtype
                )
            kept = self._signal(following) / jumped
            z = kept.sqrt() * z + (1 - kept).sqrt() * variance_noise
        z, x = z.to(sample.dtype), x.to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=z, pred_original_sample=x) if return_dict else (z, x)

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Like SchedulerMixin's, and also saves a copy of this file."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        copy = Path(save_directory, f"{self.__module__}.py")
        copy.write_bytes(Path(__file__).read_bytes())

    def _signal(self, index):
        """alpha^2 at an index."""
        return torch.tensor(1.0) if index == CLEAN else self.alphas_cumprod[int(index)]

    def _prediction(self, output, z, signal):
        """The predicted clean data and noise, converted from the network's output."""
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        if self.config.prediction_type == "epsilon":
            return (z - sigma * output) / alpha, output
        if self.config.prediction_type == "sample":
            return output, (z - alpha * output) / sigma
        return alpha * z - sigma * output, alpha * output + sigma * z
