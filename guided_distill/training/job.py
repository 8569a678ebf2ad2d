"""One training, whatever it trains: what the loop, the checkpoints and the log need to know of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from guided_distill import kinds
from guided_distill.objectives.stage import Optimization


@dataclass(frozen=True)
class Cadence:
    """How often a training reports and saves, and how many updates it makes in one call."""

    steps_per_dispatch: kinds.Count
    log_every: kinds.Count
    checkpoint_every: kinds.Count
    checkpoints_to_keep: kinds.Count
    max_nonfinite_steps: kinds.Count


@dataclass(frozen=True)
class Job:
    """A training of `total_steps` updates in a folder of its own.

    title: its name in progress and messages. about: what its checkpoints say of themselves. seed
    draws the batches, key what the losses draw. mesh: the devices that it runs on.
    """

    directory: epath.Path
    title: str
    about: Mapping[str, Any]
    settings: Optimization
    total_steps: int
    seed: int
    key: jax.Array
    cadence: Cadence
    mesh: Mesh
