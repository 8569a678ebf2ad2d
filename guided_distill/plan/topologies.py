"""Slices of TPUs by name, for the compiler, with no TPU attached."""

import importlib.metadata
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from guided_distill.chips import CHIPS, Chip
from guided_distill.errors import UserError

# JAX divides a slice into hosts with 2 x 2 chips by default, but v5e and v6e also exist as a single chip.
_SINGLE = {"chips_per_host_bounds": (1, 1, 1)}

# So that libtpu queries no metadata server, and several processes can compile at the same time.
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclass(frozen=True)
class Topology:
    """A slice, or several equal ones, and its devices, to compile for."""

    name: str
    slices: int
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def compiler(self) -> str:
        """The versions of the compiler, on which a compiled program depends."""
        return f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"


def find_topology(name: str, *, slices: int = 1) -> Topology:
    """Return the topology with a name such as v5e:4x4 or v4:2x2x4.

    Raises UserError, listing the generations, if it doesn't exist, or if the compiler isn't installed.
    """
    generation, _, shape = name.partition(":")
    chip = CHIPS.get(generation)
    sides = [int(side) for side in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    if chip is None or len(sides) != chip.axes or not all(sides) or slices < 1:
        raise UserError(_what_there_is(name, slices))
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "plan needs the compiler for TPUs, libtpu, which isn't installed: pip install 'jax[tpu]' "
            "(the extra `tpu`), on any Linux machine with x86_64, with or without a TPU"
        )
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip.platform_name}:{shape}",
            **({"num_slices": slices} if slices > 1 else {}),
            **(_SINGLE if shape == "1x1" else chip.options),
        )
    except Exception as error:  # JAX raises a plain RuntimeError, and libtpu its own type.
        raise UserError(f"{_what_there_is(name, slices)} ({str(error).splitlines()[0]})") from error
    return Topology(name, slices, chip, tuple(found.devices))


def _what_there_is(name: str, slices: int) -> str:
    plane = [key for key, chip in CHIPS.items() if chip.axes == 2]
    solid = [key for key, chip in CHIPS.items() if chip.axes == 3]
    return (
        f"--topology {name} with --slices {slices} doesn't exist: give {' or '.join(plane)} and two "
        f"sides, such as v5e:4x4, or {', '.join(solid)} and three sides, such as v4:2x2x4"
    )


def chips_of(topology: Topology) -> int:
    """Return the total number of chips."""
    return topology.slices * math.prod(map(int, topology.name.partition(":")[2].split("x")))
