"""Rematerialization: which of a block's values are kept for the backward pass, the rest recomputed."""

from typing import Annotated, Any

import flax.linen as nn
import jax

from guided_distill import kinds

KINDS: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
}
"""Checkpoint policies by name. They keep all values; the results of matrix products and convolutions; or
only the inputs of each block."""


Remat = Annotated[str, kinds.OneOf(KINDS)]


def rematerialized(block: Any, kind: Remat, **options: Any) -> Any:
    """The block's class, rematerialized by the policy KINDS[kind]. options: passed to nn.remat."""
    return block if kind == "none" else nn.remat(block, policy=KINDS[kind], **options)
