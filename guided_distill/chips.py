"""Generations of TPUs, and the peak figures that Google publishes for them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Chip:
    """A TPU generation: peak figures per JAX device, as Google publishes them.

    device_kinds: JAX's names for it. flops: per second, in bfloat16. memory: bytes. memory_bandwidth,
    link_bandwidth: bytes per second to the memory and, over all links, to the neighbours. axes: the
    dimension of a slice's grid. options: arguments of get_topology_desc besides the name.
    """

    platform_name: str
    device_kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    axes: int
    options: dict[str, Any] = field(default_factory=dict)


# JAX counts the two cores of a v4 chip as one device, and those of a 7x chip as two.
_MEGACORE = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
CHIPS = {
    "v4": Chip("v4", ("TPU v4",), 275e12, 32 * 2**30, 1228e9, 300e9, 3, _MEGACORE),
    "v5e": Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 200e9, 2),
    "v5p": Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * 2**30, 2765e9, 600e9, 3),
    "v6e": Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1640e9, 448e9, 2),
    "7x": Chip("tpu7x", ("TPU7x",), 2307e12 / 2, 192 * 2**30 / 2, 7380e9 / 2, 1200e9 / 2, 3),
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOPs a second of a JAX device in bfloat16; None if its kind isn't listed."""
    return next((each.flops for each in CHIPS.values() if device_kind in each.device_kinds), None)
