"""Where arrays live: batches are split over the devices, weights are copied to each."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def data_mesh() -> Mesh:
    """All devices in one row."""
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Examples, on `axis` of the array, split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))
