"""The compiler's figures for a program: its work, its memory, and its communication between devices."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Collective(NamedTuple):
    """One kind of collective in a program: how often it runs, and the bytes of its results per device."""

    times: int
    bytes: int


class Measured(NamedTuple):
    """The compiler's figures for a program, per device.

    flops, bytes: operations and memory traffic of one run, as the compiler counts them. seconds: the
    compiler's own estimate, or None. arguments, temporary, peak: bytes of memory. collectives: by kind.
    """

    flops: float
    bytes: float
    seconds: float | None
    arguments: int
    temporary: int
    peak: int
    collectives: dict[str, Collective]


def with_loop(once: Measured, rest: Measured, *, runs: int) -> Measured:
    """Estimate the figures of a program whose loop runs `runs` times, if the compiler counted it once.

    rest: the figures of the program without the loop. The collectives of `once` are already right: see
    `collectives_of`.
    """

    def whole(once: float, rest: float) -> float:
        return rest + runs * (once - rest)

    seconds = None
    if once.seconds is not None and rest.seconds is not None:
        seconds = whole(once.seconds, rest.seconds)
    return once._replace(
        flops=whole(once.flops, rest.flops), bytes=whole(once.bytes, rest.bytes), seconds=seconds
    )


def compile_and_measure(lowered: jax.stages.Lowered, *, level: str, loop_runs: int = 1) -> Measured:
    """Compile a program at an optimization level and return the compiler's figures.

    loop_runs: as in `collectives_of`. Raises MemoryError if the program doesn't fit into a device's
    memory.
    """
    with _optimization(level):
        try:
            compiled = lowered.compile()
        except Exception as error:  # jaxlib's own error type, identified by its message.
            if "RESOURCE_EXHAUSTED" in str(error):
                raise MemoryError(str(error).splitlines()[0]) from error
            raise
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    program: Any = compiled.as_text()
    seconds = cost.get("optimal_seconds", 0.0)
    return Measured(
        flops=cost["flops"],
        bytes=cost["bytes accessed"],
        seconds=seconds if seconds > 0 else None,
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=collectives_of(program, loop_runs=loop_runs),
    )


_MEMORY = re.compile(r"([\d.]+)([KMGT]?)\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_required(why: str) -> tuple[int, int] | None:
    """Parse the bytes that a program needs on a device, and those available, from the compiler's message.

    Both include the arguments. Returns None if the message has no figures.
    """
    if found := _MEMORY.search(why):
        needed, unit, available, its_unit = found.groups()
        return int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[its_unit])
    return None


@contextlib.contextmanager
def _optimization(level: str) -> Iterator[None]:
    before = jax.config.jax_optimization_level  # type: ignore[attr-defined]
    jax.config.update("jax_optimization_level", level)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_BEGUN = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply)=%?([^\s,)}]+)")


def collectives_of(program: str, *, loop_runs: int = 1) -> dict[str, Collective]:
    """Return the collectives in the text of a compiled program, by kind.

    An asynchronous collective is counted at its -done instruction, because the -start also lists its
    operands. loop_runs: how often each loop runs, which the text doesn't say.
    """
    computations = _computations_of(program)
    looped = _with_what_they_call(
        set(re.findall(r"\bbody=%?([^\s,]+)", program)), computations=computations
    )
    found: dict[str, Collective] = {}
    for name, lines in computations.items():
        runs = loop_runs if name in looped else 1
        for kind, size in filter(None, map(_collective, lines)):
            times, total = found.get(kind, Collective(0, 0))
            found[kind] = Collective(times + runs, total + runs * size)
    return found


def _computations_of(program: str) -> dict[str, list[str]]:
    """Return the lines of each computation by its name; the lines before the first one under ""."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        if begun := _BEGUN.match(line):
            name = begun[1]
        computations.setdefault(name, []).append(line)
    return computations


def _with_what_they_call(names: set[str], *, computations: dict[str, list[str]]) -> set[str]:
    called = {
        name
        for each in names
        for line in computations.get(each, [])
        for name in _CALLED.findall(line)
    }
    if called <= names:
        return names
    return _with_what_they_call(names | called, computations=computations)


def _collective(line: str) -> tuple[str, int] | None:
    """Return the kind and the bytes of results of a line, or None if it isn't a collective."""
    match = re.match(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(_KINDS)})(-start|-done)?\(", line)
    if match is None or match[3] == "-start":
        return None
    return match[2], _bytes_of(match[1])


def _bytes_of(shapes: str) -> int:
    return sum(
        math.prod(int(length) for length in lengths.split(",") if length) * _width(kind)
        for kind, lengths in _ARRAY.findall(shapes)
    )


def _width(kind: str) -> int:
    """Return the bytes of an element of a type such as f32, bf16, s8 or pred."""
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1
