"""The description of one training job, shared by the loop, the checkpoints and the log."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from guided_distill import kinds
from guided_distill.objectives.stage import Optimization


@dataclass(frozen=True)
class Cadence:
    """How often a job logs and saves, in updates, and how many updates one call of the step makes."""

    steps_per_dispatch: kinds.Count
    log_every: kinds.Count
    checkpoint_every: kinds.Count
    checkpoints_to_keep: kinds.Count
    max_nonfinite_steps: kinds.Count


class Project(NamedTuple):
    """A project of Weights & Biases, and the mode: online, offline or disabled."""

    name: str
    mode: str


@dataclass(frozen=True)
class Monitoring:
    """What a run reports besides its own log, without an effect on its weights.

    profile: the number of updates to trace in the first stage that is trained; None for no trace.
    wandb: the project that receives the log; None for no project.
    """

    profile: kinds.Count | None = None
    wandb: Project | None = None


UNMONITORED = Monitoring()


@dataclass(frozen=True)
class Job:
    """A training job of `total_steps` updates, with its own folder.

    title: its name in the progress bar and in messages. about: the self-description in its checkpoints.
    seed: of the batches. key: for the random numbers of the loss. mesh: the devices that it runs on.
    monitoring: what it reports besides its log.
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
    monitoring: Monitoring = UNMONITORED
