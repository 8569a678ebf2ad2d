"""The mesh and the shardings: examples are split over all devices, weights over some or none of them.

A mesh has two axes. Weights, their average and the optimizer's state are split over "fsdp" and replicated
over "data"; the examples of a batch are split over both. If "fsdp" has one device, training is
data-parallel. The devices along "fsdp" belong to one slice, whose links are fast; slices share a batch.
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
"""The partition spec of arrays whose first axis is the batch: split over all devices."""


def data_mesh(devices: Sequence[Any] | None = None, *, fsdp: int = 1) -> Mesh:
    """Return a mesh of all or the given devices, with weights split over `fsdp` devices of a slice.

    fsdp: 0 for all devices of a slice. Raises UserError unless it divides their number.
    """
    slices = _slices(jax.devices() if devices is None else devices)
    size = len(slices[0])
    fsdp = fsdp or size
    if fsdp < 1 or size % fsdp:
        raise UserError(
            f"config.fsdp is {fsdp}, which doesn't divide {size} devices"
            f"{' of a slice' if len(slices) > 1 else ''}: choose a number that does"
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
    """Return the devices of each slice; a single slice if JAX reports none."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [slices[index] for index in sorted(slices)]


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Return the sharding that splits the examples, on `axis` of the array, over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, *EXAMPLES))


def split_weights(mesh: Mesh, tree: Any) -> Any:
    """Return a sharding for each array: splits its longest axis that "fsdp" divides, if there is one."""
    return jax.tree.map(lambda leaf: _split_longest(mesh, leaf.shape), tree)


def _split_longest(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    count = mesh.shape[FSDP_AXIS]
    lengths = [length if length % count == 0 else 0 for length in shape]
    if count == 1 or not any(lengths):
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * int(np.argmax(lengths)), FSDP_AXIS))


def mean_over_devices(tree: Any, specs: Any) -> Any:
    """Return the mean over all devices of each device's arrays, for use in `jax.shard_map`.

    specs: for each array, the partition spec of its mean: split over "fsdp", or whole on each device.
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
