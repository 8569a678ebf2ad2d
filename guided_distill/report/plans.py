"""Plans as a table and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from guided_distill.plan.plan import CALL, Plan, total_hours
from guided_distill.plan.topologies import Topology, chips_of

COMFORT = 0.1
"""The share of memory that a run should leave free, for what the compiler doesn't foresee."""


def plan_table(plans: Sequence[Plan], topology: Topology, *, level: str) -> Table:
    """A table of plans with a column for each program."""
    table = Table(
        title=f"{topology.slices} x {topology.name}, {chips_of(topology)} chips; compiled at {level} by "
        f"{topology.compiler}, not run",
        caption=" ".join(_notes(topology)),
    )
    table.add_column("per device")
    for plan in plans:
        table.add_column(plan.kind, justify="right")
    for name, cells in _rows(plans).items():
        table.add_row(name, *cells)
    return table


def plan_json(plans: Sequence[Plan], topology: Topology, *, level: str) -> dict[str, Any]:
    """The request, the plan of each program, and the total hours of the planned stages."""
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": chips_of(topology),
        "optimization_level": level,
        "compiler": topology.compiler,
        "notes": _notes(topology),
        "hours": total_hours(plans),
        "plans": [plan.to_json() for plan in plans],
    }


def lines_under(plans: Sequence[Plan]) -> list[str]:
    """The lines below the table: why a program has no figures, sampling times, and total hours."""
    lines = [f"{plan.kind}: {plan.why}" for plan in plans if plan.why]
    lines += [_sample_line(plan) for plan in plans if plan.sample_seconds]
    kinds = [plan.kind for plan in plans if plan.kind != CALL]
    if kinds:
        hours = total_hours(plans)
        lines.append(
            "Some stages have no plan, for the reasons above."
            if hours is None
            else f"All of {', '.join(kinds)}: {hours:,.3g} hours."
        )
    return lines


def _sample_line(plan: Plan) -> str:
    times = [
        f"{seconds:.3g} s in {n} step{'s' * (n > 1)}" for n, seconds in plan.sample_seconds.items()
    ]
    return f"{plan.batch_size} samples take {', '.join(times)}."


def _notes(topology: Topology) -> list[str]:
    notes = [
        "Times are the compiler's estimate, or the largest bound if that is larger.",
        "The largest batch is an estimate in proportion to memory.",
    ]
    if topology.slices > 1:
        notes.append(
            "Traffic between slices is counted at the speed of links within a slice; it takes longer."
        )
    return notes


def _rows(plans: Sequence[Plan]) -> dict[str, list[str]]:
    kinds = sorted({kind for plan in plans if plan.measured for kind in plan.measured.collectives})
    columns = [_column(plan, kinds) for plan in plans]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return {name: [column.get(name, "-") for column in columns] for name in names}


def _column(plan: Plan, kinds: Sequence[str]) -> dict[str, str]:
    about = {
        "parameters": f"{plan.parameters:,}",
        "batch, all devices": str(plan.batch_size),
        "MB per example for the backward pass": f"{plan.kept / 1e6:.3g}",
        "fits": _fits(plan),
    }
    measured, seconds = plan.measured, plan.seconds
    if plan.shortage is not None:
        about |= {
            "peak memory, GiB": _gib(plan.shortage.needed),
            "  of which arguments": _gib(plan.shortage.held),
            "largest batch, about": str(plan.largest_batch),
        }
    if measured is None or seconds is None:
        return about
    about |= {
        "peak memory, GiB": _gib(measured.peak),
        "  of which arguments": _gib(measured.arguments),
        "temporary memory, GiB": _gib(measured.temporary),
        "largest batch, about": str(plan.largest_batch),
        "TFLOP": f"{measured.flops / 1e12:.3g}",
        "GB to and from memory": f"{measured.bytes / 1e9:.3g}",
    }
    for kind in kinds:
        times, size = measured.collectives.get(kind, (0, 0))
        about[f"{kind}, MB (times)"] = f"{size / 1e6:.3g} ({times})"
    about |= {f"ms at peak {name}": f"{1e3 * each:.3g}" for name, each in plan.bounds.items()}
    about |= {
        "ms, estimated": f"{1e3 * seconds:.3g}",
        "images per second, all devices": f"{plan.images_per_second:,.0f}",
    }
    if plan.kind != CALL:
        about |= {"updates": f"{plan.updates:,}", "hours": f"{plan.hours:,.3g}"}
    return about


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _fits(plan: Plan) -> str:
    if plan.shortage is not None:
        return f"no, {_gib(plan.shortage.available)} GiB available"
    if plan.spare is None:
        return "not known" if plan.broke else "no"
    return f"{'yes' if plan.spare >= COMFORT else 'barely'}, {plan.spare:.0%} spare"
