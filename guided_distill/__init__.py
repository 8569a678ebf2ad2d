"""Distillation of classifier-free guided diffusion models, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

from guided_distill.errors import UserError

if TYPE_CHECKING:
    from guided_distill.api import Model, load

__all__ = ["Model", "UserError", "load"]


def __getattr__(name: str) -> Any:
    # Only when asked for: `guided-distill --help` answers at once.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from guided_distill import api

    return getattr(api, name)
