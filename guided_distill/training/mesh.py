"""Where arrays live: examples are split over all devices, weights over some of them or none.

A mesh has two axes. Weights, their average and the optimizer's state are split over "fsdp" and copied
along "data"; the examples of a batch are split over both. With one device on "fsdp", training is
data-parallel. Devices along "fsdp" are of one slice, within which links are fast; slices share a batch.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from guided_distill.errors import UserError

DATA_AXIS, FSDP_AXIS = "data", "fsdp"

EXAMPLES = PartitionSpec((DATA_AXIS, FSDP_AXIS))
"""Of arrays whose first axis is the batch: over all devices."""


def data_mesh(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """All devices, or those given; weights are split over `fsdp` of a slice's, 0 for all of these.

    Raises UserError unless that divides their number.
    """
    slices = _slices(jax.devices() if devices is None else devices)
    size = len(slices[0])
    fsdp = fsdp or size
    if fsdp < 1 or size % fsdp:
        raise UserError(
            f"config.fsdp is {fsdp}, which doesn't divide {size} devices"
            f"{' of a slice' if len(slices) > 1 else ''}: choose one that does"
        )
    grids = [
        mesh_utils.create_device_mesh((size // fsdp, fsdp), each, allow_split_physical_axes=True)
        for each in slices
    ]
    return Mesh(
        np.concatenate(grids),
        (DATA_AXIS, FSDP_AXIS),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of each slice; where JAX tells of none, all are of one."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [slices[index] for index in sorted(slices)]


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Examples, on `axis` of the array, split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, *EXAMPLES))


def split_weights(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each array of a tree: its longest axis that "fsdp" divides is split, if any."""
    return jax.tree.map(lambda leaf: _split_longest(mesh, leaf.shape), tree)


def _split_longest(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    count = mesh.shape[FSDP_AXIS]
    lengths = [length if length % count == 0 else 0 for length in shape]
    if count == 1 or not any(lengths):
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * int(np.argmax(lengths)), FSDP_AXIS))


def mean_over_devices(tree: Any, specs: Any) -> Any:
    """The mean over all devices of each one's arrays, for use in `jax.shard_map`.

    specs: for each array, where the mean is to live: along "fsdp" in parts, or on each device whole.
    """

    def mean(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        count = jax.lax.axis_size(DATA_AXIS) * jax.lax.axis_size(FSDP_AXIS)
        if FSDP_AXIS in spec:
            leaf = jax.lax.psum_scatter(
                leaf, FSDP_AXIS, scatter_dimension=spec.index(FSDP_AXIS), tiled=True
            )
            return jax.lax.psum(leaf, DATA_AXIS) / count
        return jax.lax.psum(leaf, (DATA_AXIS, FSDP_AXIS)) / count

    return jax.tree.map(mean, tree, specs)
