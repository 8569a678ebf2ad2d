"""Where arrays live: examples are split over all devices, weights over some of them or none.

A mesh has two axes. Weights, their average and the optimizer's state are split over "fsdp" and copied
along "data"; the examples of a batch are split over both. With one device on "fsdp", training is
data-parallel.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from guided_distill.errors import UserError

DATA_AXIS, FSDP_AXIS = "data", "fsdp"


def data_mesh(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """All devices, or those given; weights are split over `fsdp` of them, 0 for all.

    Raises UserError unless that divides their number.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = fsdp or len(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(
            f"config.fsdp is {fsdp}, which doesn't divide {len(devices)} devices: choose one that "
            f"does"
        )
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        (DATA_AXIS, FSDP_AXIS),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Examples, on `axis` of the array, split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, (DATA_AXIS, FSDP_AXIS)))


def split_weights(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each array of a tree: its longest axis that "fsdp" divides is split, if any."""
    return jax.tree.map(lambda leaf: _split_longest(mesh, leaf.shape), tree)


def _split_longest(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    count = mesh.shape[FSDP_AXIS]
    lengths = [length if length % count == 0 else 0 for length in shape]
    if count == 1 or not any(lengths):
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * int(np.argmax(lengths)), FSDP_AXIS))
