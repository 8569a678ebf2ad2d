"""Plans as tables."""

from collections.abc import Sequence

from rich.table import Table

from guided_distill.plan.plan import CALL, Plan
from guided_distill.plan.topologies import Topology, chips_of

COMFORT = 0.1
"""The share of memory that a run should leave free, for what the compiler doesn't foresee."""


def plan_table(plans: Sequence[Plan], topology: Topology, *, level: str) -> Table:
    """A column a program."""
    table = Table(
        title=f"{topology.slices} x {topology.name}, {chips_of(topology)} chips; compiled at {level} by "
        f"{topology.compiler}, not run",
        caption="Seconds are the compiler's estimate, or the largest bound if that is more.",
    )
    table.add_column("a device")
    for plan in plans:
        table.add_column(plan.kind, justify="right")
    for name, cells in _rows(plans).items():
        table.add_row(name, *cells)
    return table


def schedule_line(plans: Sequence[Plan]) -> str:
    """The hours of all stages that were planned."""
    hours = [plan.hours for plan in plans if plan.kind != CALL]
    if not hours or None in hours:
        return "Not all stages have a plan: see why above."
    total = sum(each for each in hours if each is not None)
    return f"All of {', '.join(p.kind for p in plans if p.kind != CALL)}: {total:,.3g} hours."


def _rows(plans: Sequence[Plan]) -> dict[str, list[str]]:
    kinds = sorted({kind for plan in plans if plan.measured for kind in plan.measured.collectives})
    columns = [_column(plan, kinds) for plan in plans]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return {name: [column.get(name, "-") for column in columns] for name in names}


def _column(plan: Plan, kinds: Sequence[str]) -> dict[str, str]:
    about = {
        "parameters": f"{plan.parameters:,}",
        "batch, all devices": str(plan.batch_size),
        "MB an example for the backward pass": f"{plan.kept / 1e6:.3g}",
        "fits": _fits(plan),
    }
    measured, seconds = plan.measured, plan.seconds
    if measured is None or seconds is None:
        return about
    about |= {
        "peak memory, GiB": f"{measured.peak / 2**30:.2f}",
        "  of which arguments": f"{measured.arguments / 2**30:.2f}",
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
        "images a second, all devices": f"{plan.images_per_second:,.0f}",
    }
    if plan.kind != CALL:
        about |= {"updates": f"{plan.updates:,}", "hours": f"{plan.hours:,.3g}"}
    return about


def _fits(plan: Plan) -> str:
    if plan.spare is None:
        return "not known" if plan.broke else "no"
    return f"{'yes' if plan.spare >= COMFORT else 'barely'}, {plan.spare:.0%} spare"
