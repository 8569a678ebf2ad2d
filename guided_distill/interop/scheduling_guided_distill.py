"""A diffusers scheduler for students of the stochastic sampler; needs torch and diffusers alone.

It is copied beside such a student by `guided-distill export`, and used from there or from here:

    pipe.scheduler = GuidedDistillStochasticScheduler.from_config(pipe.scheduler.config)
"""

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

CLEAN = -1
"""The index that stands for data without noise."""


class GuidedDistillStochasticScheduler(DDIMScheduler):
    """Two steps of DDIM forward, one step of noise back (Meng et al. 2023, "stochastic sampler").

    With N steps the network is called at indices round(1000 n / N) - 1, n = N ... 1. From each it jumps
    to the index after the next, and fresh noise takes it one back; the last jump goes to clean data.
    """

    def set_timesteps(self, num_inference_steps, device=None, **_):
        """Choose the indices of `num_inference_steps` steps, noisiest first."""
        length = self.config.num_train_timesteps
        ends = range(num_inference_steps, -1, -1)
        self.num_inference_steps = num_inference_steps
        self._indices = [round(length * n / num_inference_steps) - 1 for n in ends]
        self.timesteps = torch.tensor(self._indices[:-1], device=device)

    def step(
        self,
        model_output,
        timestep,
        sample,
        eta=0.0,
        use_clipped_model_output=False,
        generator=None,
        variance_noise=None,
        return_dict=True,
    ):
        """The sample at the next index. eta and use_clipped_model_output are not used."""
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

    def _signal(self, index):
        """alpha squared at an index."""
        return torch.tensor(1.0) if index == CLEAN else self.alphas_cumprod[int(index)].cpu()

    def _prediction(self, output, z, signal):
        """Clean data and noise, as the network's output tells them."""
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        if self.config.prediction_type == "epsilon":
            return (z - sigma * output) / alpha, output
        if self.config.prediction_type == "sample":
            return output, (z - alpha * output) / sigma
        return alpha * z - sigma * output, alpha * output + sigma * z
