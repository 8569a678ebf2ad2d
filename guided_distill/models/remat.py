"""What a network keeps of its blocks for the backward pass; the rest is computed again."""

from typing import Annotated, Any

import flax.linen as nn
import jax

from guided_distill import kinds

KINDS: dict[str, Any] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "products": jax.checkpoint_policies.dots_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
}
"""By the name of what is kept less and less of: all, products of matrices and convolutions, inputs."""


Remat = Annotated[str, kinds.OneOf(KINDS)]


def rematerialized(block: Any, kind: Remat, **options: Any) -> Any:
    """The block's class, such that it keeps what KINDS[kind] says. options: those of nn.remat."""
    return block if kind == "none" else nn.remat(block, policy=KINDS[kind], **options)
