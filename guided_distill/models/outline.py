"""The shapes of an example and its condition, for which a network is built."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

LABEL: tuple[tuple[str, tuple[int, ...]], ...] = (("label", ()),)
"""The condition_shapes of data with labels."""


@dataclass(frozen=True)
class Outline:
    """The shapes and classes of a data set.

    shape: the shape of one example. num_classes: 0 if there are no labels. condition_shapes: the shapes
    of one example's condition, by name. latent: whether examples are an autoencoder's latents.
    """

    shape: tuple[int, ...]
    num_classes: int
    condition_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(LABEL))
    latent: bool = False

    @property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of one example, as `Source.read` returns it."""
        kinds = {"label": jnp.int32}
        condition = {
            name: jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.float32))
            for name, shape in self.condition_shapes.items()
        }
        return {"image": jax.ShapeDtypeStruct(self.shape, jnp.float32), **condition}

    @property
    def null(self) -> dict[str, jax.ShapeDtypeStruct] | None:
        """The shape of the null condition; None for labels, whose null label the network knows."""
        return {"text": self.example["text"]} if "text" in self.condition_shapes else None
