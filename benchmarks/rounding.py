"""Measure how much of a halving round's training signal a bfloat16 network loses to rounding.

    python benchmarks/rounding.py 600

A small U-Net first trains on the digits for the given number of updates, in float32. Then, for each N, a
student with N steps starts as a copy of its teacher, and the signal is (target - teacher) in v.
"rounding" is the error of this signal when the network computes in bfloat16, as a fraction of the signal;
both are root mean squares, and both networks have the same rounded weights. "student" is the same when
only the target is computed in float32. Prints one line per N.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from guided_distill import draws
from guided_distill.data import sources
from guided_distill.data.outline import outline_of
from guided_distill.diffusion.guidance import Denoiser
from guided_distill.diffusion.process import add_noise, velocity
from guided_distill.diffusion.schedules import cosine
from guided_distill.models.registry import Network, Params, build_network
from guided_distill.objectives.halving import JUMPS, halving_target
from guided_distill.objectives.stage import Examples
from guided_distill.objectives.teacher import Teacher, teacher_loss

OPTIONS = {
    "width": 16,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_resolutions": (4,),
    "head_width": 16,
    "embedding_width": 64,
}
BATCH = 32


def trained(network: Network, data: dict[str, Any], updates: int) -> Params:
    """Return the weights after `updates` updates by Adam at a learning rate of 1e-3."""
    optimizer = optax.adam(1e-3)

    @jax.jit
    def update(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        keys = jax.random.split(key, BATCH)
        chosen = draws.integers(keys, 0, len(data["image"]))
        condition = {"label": data["label"][chosen]}

        def loss(params: Params) -> jax.Array:
            return teacher_loss(
                network.denoiser(params),
                Examples(data["image"][chosen], condition, keys),
                schedule=network.schedule,
                settings=Teacher(weighting="truncated_snr"),
            ).per_example.mean()

        changes, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, changes), state

    params = network.init(draws.key_of(0))
    state = optimizer.init(params)
    for index in range(updates):
        params, state = update(params, state, draws.key_of(index))
    return params


def main() -> None:
    source = sources.load_source("digits", split="train", image_size=None, seed=0)
    examples = source.read(range(source.size))
    data = {name: jnp.asarray(examples[name]) for name in ("image", "label")}
    networks = {
        dtype: build_network(
            name="unet",
            options=OPTIONS,
            parameterization="v",
            schedule=cosine(),
            dtype=dtype,
            outline=outline_of(source),
        )
        for dtype in ("float32", "bfloat16")
    }
    params = trained(networks["float32"], data, int(sys.argv[1]))
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), networks["bfloat16"].rounded(params)
    )
    schedule = networks["float32"].schedule
    x, condition = data["image"][:256], {"label": data["label"][:256]}
    keys = jax.random.split(draws.key_of(2), len(x))
    eps = draws.normal(draws.key_of(1), x.shape)

    def size(values: jax.Array) -> float:
        return float(jnp.sqrt(jnp.mean(jnp.square(values))))

    predict = {
        dtype: jax.jit(network.denoiser(params).predict) for dtype, network in networks.items()
    }

    def differences(dtype: str, num_steps: int) -> tuple[jax.Array, jax.Array]:
        """Return v of the target and of the teacher."""
        i = draws.integers(keys, 1, num_steps + 1)
        jump = JUMPS["ddim"](i.astype(jnp.float32), num_steps)
        log_snr = schedule(jump.t)
        z = add_noise(x, eps, log_snr=log_snr)
        teacher = Denoiser(predict[dtype], guided=True, null=None)
        target = halving_target(teacher, z, condition, None, jump=jump, schedule=schedule)
        own = teacher.predict(z, jump.t, condition, None)
        return velocity(target, log_snr), velocity(own, log_snr)

    for num_steps in (512, 256, 64, 8):
        target, own = differences("float32", num_steps)
        rounded_target, rounded_own = differences("bfloat16", num_steps)
        signal = target - own
        print(
            f"N {num_steps:4}  target - teacher {size(signal):.5f}  "
            f"rounding {size(rounded_target - rounded_own - signal) / size(signal):.3f} of it  "
            f"student {size(own - rounded_own) / size(signal):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
