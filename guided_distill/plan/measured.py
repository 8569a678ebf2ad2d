"""What the compiler says of a program: its work, its memory, and what its devices send each other."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Collective(NamedTuple):
    """What one kind of communication moves in a program: how often, and bytes of results a device."""

    times: int
    bytes: int


class Measured(NamedTuple):
    """What the compiler says of a program, by device.

    flops, bytes: of one run, as it counts them. seconds: its own estimate, None where it makes none.
    arguments, temporary, peak: bytes of memory. collectives: by kind.
    """

    flops: float
    bytes: float
    seconds: float | None
    arguments: int
    temporary: int
    peak: int
    collectives: dict[str, Collective]


def with_loop(once: Measured, rest: Measured, *, runs: int) -> Measured:
    """What a program does whose loop runs so often, where the compiler counted the loop's body once.

    rest: of the program without the loop. Collectives were counted right: see `collectives_of`.
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
    """Compile at an optimization level, and read what the compiler says; loop_runs: of `collectives_of`.

    Raises MemoryError if the program doesn't fit into a device's memory.
    """
    with _optimization(level):
        try:
            compiled = lowered.compile()
        except Exception as error:  # jaxlib's own error, told by its words alone.
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


def collectives_of(program: str, *, loop_runs: int = 1) -> dict[str, Collective]:
    """The collectives of a compiled program's text, by kind, those that occur.

    A started one counts where it is done, so that its operands aren't taken for results. One in the body
    of a loop counts loop_runs times: the text doesn't tell.
    """
    bodies = set(re.findall(r"\bbody=%?([^\s,]+)", program))
    found: dict[str, Collective] = {}
    runs = 1
    for line in program.splitlines():
        if begun := _BEGUN.match(line):
            runs = loop_runs if begun[1] in bodies else 1
        match = re.match(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(_KINDS)})(-start|-done)?\(", line)
        if match is None or match[3] == "-start":
            continue
        times, size = found.get(match[2], Collective(0, 0))
        found[match[2]] = Collective(times + runs, size + runs * _bytes_of(match[1]))
    return found


def _bytes_of(shapes: str) -> int:
    return sum(
        math.prod(int(length) for length in lengths.split(",") if length) * _width(kind)
        for kind, lengths in _ARRAY.findall(shapes)
    )


def _width(kind: str) -> int:
    """Bytes of an element: f32, bf16, s8, pred ..."""
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1
