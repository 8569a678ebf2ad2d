"""The shapes of a network's weights, without computing them, and the weights' fingerprint."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError

from guided_distill.errors import UserError
from guided_distill.storage import first_line


def weight_shapes(init: Callable[[], Any], where: object) -> Any:
    """The tree of weights that `init` would return, as jax.ShapeDtypeStruct; nothing is computed.

    Raises UserError, naming the file or folder `where`, if the network can't be built.
    """
    try:
        return jax.eval_shape(init)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, FlaxError) as error:
        raise UserError(
            f"{where} describes a network that can't be built ({first_line(error)}): use the config "
            f"that came with the weights"
        ) from error


def weights_fingerprint(settings: object, params: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a network's settings and weights, in tree order."""
    digest = hashlib.sha256(repr(settings).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
