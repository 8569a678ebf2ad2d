"""The plan of a run: the memory that its stages need on a slice of TPUs, and the time they may take."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from guided_distill.chips import Chip
from guided_distill.config import Experiment
from guided_distill.errors import UserError
from guided_distill.models.outline import Outline
from guided_distill.models.registry import check_network
from guided_distill.objectives.stage import Stage
from guided_distill.plan.compiler import CompileTask, Shortage, run_compiler
from guided_distill.plan.measured import Measured
from guided_distill.plan.programs import kept_bytes, networks_of, parameter_count, student_of
from guided_distill.plan.topologies import Topology
from guided_distill.stages import all_stages, check_batch, teacher_of
from guided_distill.training.mesh import data_mesh
from guided_distill.training.progress import progress

CALL = "sampling"
"""The kind of the plan for one step of a student's sampler."""

# The bytes that a device sends, relative to the result, on a ring of many devices.
_TRAFFIC = {"all-reduce": 2.0}


@dataclass(frozen=True)
class Plan:
    """The plan for one program: a stage's update, or a call of the student on a batch of examples.

    kind: the stage's kind, and its teacher's if the rounds differ in that. updates: total over all stages
    of this kind. parameters: of the network. kept: bytes of activations per example that the backward
    pass needs. measured: the compiler's figures, per device; None if the program doesn't fit or the
    compiler crashed (broke). why: the reason for None; shortage: the missing memory, if the compiler gave
    figures. calls: for the plan of sampling only, the number of network calls per sample by the student's
    N.
    """

    kind: str
    updates: int
    batch_size: int
    devices: int
    chip: Chip
    parameters: int
    kept: int
    measured: Measured | None
    broke: bool = False
    why: str = ""
    shortage: Shortage | None = None
    calls: Mapping[int, int] = field(default_factory=dict)

    @property
    def spare(self) -> float | None:
        """The fraction of a device's memory that stays free."""
        return None if self.measured is None else 1 - self.measured.peak / self.chip.memory

    @property
    def largest_batch(self) -> int | None:
        """The largest batch that fits, estimated: all memory but the arguments grows with the batch."""
        if self.measured is not None:
            needed, held = self.measured.peak, self.measured.arguments
            available = self.chip.memory
        elif self.shortage is not None:
            needed, available, held = self.shortage
        else:
            return None
        times = max(0, available - held) / max(1, needed - held)
        return int(self.batch_size / self.devices * times) * self.devices

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds that computation, memory and network would each take alone, at their peak rates."""
        if self.measured is None:
            return {}
        moved = sum(
            _TRAFFIC.get(kind, 1.0) * each.bytes for kind, each in self.measured.collectives.items()
        )
        return {
            "compute": self.measured.flops / self.chip.flops,
            "memory": self.measured.bytes / self.chip.memory_bandwidth,
            "network": moved / self.chip.link_bandwidth,
        }

    @property
    def seconds(self) -> float | None:
        """Seconds of an update or call: the compiler's estimate, or the largest bound if that is more."""
        if self.measured is None:
            return None
        return max(self.measured.seconds or 0.0, *self.bounds.values())

    @property
    def images_per_second(self) -> float | None:
        """Images per second on all devices together."""
        return None if self.seconds is None else self.batch_size / self.seconds

    @property
    def hours(self) -> float | None:
        """Hours for all stages of this kind."""
        return None if self.seconds is None else self.updates * self.seconds / 3600

    @property
    def sample_seconds(self) -> dict[int, float]:
        """Seconds to sample a batch, by the student's N."""
        if self.seconds is None:
            return {}
        return {num_steps: calls * self.seconds for num_steps, calls in self.calls.items()}

    def to_json(self) -> dict[str, Any]:
        """Return all fields and properties as JSON-serializable data."""
        names = (
            "spare",
            "largest_batch",
            "bounds",
            "seconds",
            "images_per_second",
            "hours",
            "sample_seconds",
        )
        measured = self.measured and {
            **self.measured._asdict(),
            "collectives": {k: v._asdict() for k, v in self.measured.collectives.items()},
        }
        return {
            **{each.name: getattr(self, each.name) for each in dataclasses.fields(self)},
            "chip": dataclasses.asdict(self.chip),
            "measured": measured,
            "shortage": self.shortage and self.shortage._asdict(),
            **{name: getattr(self, name) for name in names},
        }


def total_hours(plans: Sequence[Plan]) -> float | None:
    """Return the hours of all stages in the plans; None if one has no estimate or there are none."""
    hours = [plan.hours for plan in plans if plan.kind != CALL]
    known = [each for each in hours if each is not None]
    return sum(known) if hours and len(known) == len(hours) else None


def make_plans(
    experiment: Experiment,
    outline: Outline,
    topology: Topology,
    *,
    stage: str,
    level: str,
    cache: epath.Path,
) -> list[Plan]:
    """Return the plans for a kind of stage, for "sampling", or for "all".

    Halving rounds with the same kind of teacher share one plan, made for the first sampler: other
    samplers differ only in the times of their jumps, and need as much work. level: the compiler's
    optimization level. cache: a folder that caches the compiler's results. Raises UserError if the config
    has no such stage, or if the devices can't divide a batch.
    """
    groups = _alike(experiment)
    kinds = list(dict.fromkeys(each[0].kind for each in groups.values()))
    wanted = {name: each for name, each in groups.items() if stage in (each[0].kind, "all")}
    if stage in (CALL, "all"):
        wanted[CALL] = []
    if not wanted:
        raise UserError(
            f"--stage is {stage}, which this config doesn't have: choose one of "
            f"{', '.join(kinds)}, {CALL}, all"
        )
    check_network(student_of(experiment, outline))
    devices = data_mesh(topology.devices, fsdp=experiment.fsdp).size
    for kind in sorted({each[0].kind if each else "guidance" for each in wanted.values()}):
        check_batch(kind, getattr(experiment, kind), devices=devices)
    plans, student = [], student_of(experiment, outline)
    # Students that aren't conditioned on w need guidance when they are sampled: two calls per step.
    calls_a_step = 2 if experiment.method == "two_student" else 1
    students = sorted(
        {n for stage in all_stages(experiment) if (n := stage.num_steps)}, reverse=True
    )
    with progress(f"plan for {topology.name}", total=len(wanted), unit="programs") as advance:
        for done, (name, stages) in enumerate(wanted.items(), start=1):
            first = stages[0] if stages else None
            network = networks_of(experiment, outline, first)[0] if first else student
            settings = first.settings if first else experiment.guidance
            task = CompileTask(
                experiment,
                outline,
                first,
                topology=topology.name,
                slices=topology.slices,
                level=level,
            )
            plans.append(
                Plan(
                    kind=name,
                    updates=sum(each.total_steps for each in stages),
                    batch_size=settings.batch_size,
                    devices=devices,
                    chip=topology.chip,
                    parameters=parameter_count(network),
                    kept=kept_bytes(network),
                    calls={} if first else {n: n * calls_a_step for n in students},
                    **run_compiler(task, cache=cache)._asdict(),
                )
            )
            advance(done, name)
    return plans


def _alike(experiment: Experiment) -> dict[str, list[Stage]]:
    """Group stages by kind, and a kind by whether the teachers take w if they differ in that."""
    groups: dict[tuple[str, bool], list[Stage]] = {}
    for each in all_stages(experiment):
        teacher = teacher_of(experiment, each)
        groups.setdefault((each.kind, teacher is not None and teacher.takes_w), []).append(each)
    kinds = [kind for kind, _ in groups]
    return {
        f"{kind} of {'a student' if takes_w else 'the teacher'}"
        if kinds.count(kind) > 1
        else kind: stages
        for (kind, takes_w), stages in groups.items()
    }
