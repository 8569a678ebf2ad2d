"""What a network is made for: the shapes of an example and its condition."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

LABEL: tuple[tuple[str, tuple[int, ...]], ...] = (("label", ()),)
"""The condition_shapes of data with classes."""


@dataclass(frozen=True)
class Outline:
    """What data are like. shape: of one example; condition_shapes: of its condition, by name.

    num_classes: 0 where there are no labels. latent: whether examples are an autoencoder's latents.
    """

    shape: tuple[int, ...]
    num_classes: int
    condition_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(LABEL))
    latent: bool = False

    @property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """One example, as `Source.read` returns it."""
        kinds = {"label": jnp.int32}
        condition = {
            name: jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.float32))
            for name, shape in self.condition_shapes.items()
        }
        return {"image": jax.ShapeDtypeStruct(self.shape, jnp.float32), **condition}

    @property
    def null(self) -> dict[str, jax.ShapeDtypeStruct] | None:
        """What stands for no condition; None for labels, of which the network knows it."""
        return {"text": self.example["text"]} if "text" in self.condition_shapes else None
