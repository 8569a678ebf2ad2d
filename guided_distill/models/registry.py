"""Networks by name, and the conversion of a network's raw output to a Denoiser."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill import kinds
from guided_distill.diffusion.guidance import Condition, Denoiser
from guided_distill.diffusion.process import Prediction, prediction_from
from guided_distill.diffusion.schedules import Schedule, timestep_index
from guided_distill.errors import UserError
from guided_distill.models.dit import DiT
from guided_distill.models.mlp import MLP
from guided_distill.models.outline import LABEL, Outline
from guided_distill.models.stable_diffusion.unet import UNet2DCondition
from guided_distill.models.transformer import PatchTransformer
from guided_distill.models.unet import UNet

MODELS: dict[str, type[nn.Module]] = {
    "dit": DiT,
    "mlp": MLP,
    "sd_unet": UNet2DCondition,
    "transformer": PatchTransformer,
    "unet": UNet,
}

Params = Mapping[str, Any]

# The run or Flax sets these, not a config's model.options.
NOT_OPTIONS = (
    "num_classes",
    "w_conditioned",
    "w_embedding",
    "num_outputs",
    "dropout",
    "dtype",
    "parent",
    "name",
)


@dataclass(frozen=True)
class Network:
    """A Flax module, without its weights, and what is needed to interpret its output.

    parameterization: what the module predicts, one of process.PARAMETERIZATIONS. data_shape: the shape
    of one example, without the batch. condition_shapes: the shapes of one example's condition, by name.
    latent: whether examples are an autoencoder's latents.
    """

    module: nn.Module
    schedule: Schedule
    parameterization: str
    data_shape: tuple[int, ...]
    num_classes: int
    w_conditioned: bool
    condition_shapes: tuple[tuple[str, tuple[int, ...]], ...] = LABEL
    latent: bool = False

    @property
    def of_images(self) -> bool:
        """Whether an example is an image with pixels in [-1, 1], rather than a point or latents."""
        return len(self.data_shape) == 3 and not self.latent

    @property
    def options(self) -> dict[str, Any]:
        """The settings that decide the weights' shapes, by name.

        Two networks with equal options can share all weights except those of w.
        """
        others = ("w_conditioned", "w_embedding", "dropout", "dtype", "remat", "parent", "name")
        fields = [each.name for each in dataclasses.fields(self.module) if each.name not in others]
        return {
            "network": type(self.module).__name__,
            **{name: getattr(self.module, name) for name in fields},
        }

    @property
    def null(self) -> Condition | None:
        """The null label, as a condition; None for text, whose null condition comes from its encoder."""
        return {"label": self.num_classes} if "label" in dict(self.condition_shapes) else None

    def init(self, key: jax.Array) -> Params:
        """Newly initialized weights."""
        one = jnp.zeros((1,))
        return self.module.init(
            key,
            jnp.zeros((1, *self.data_shape)),
            one,
            {
                name: jnp.zeros((1, *shape), jnp.int32 if name == "label" else jnp.float32)
                for name, shape in self.condition_shapes
            },
            one if self.w_conditioned else None,
        )["params"]

    def rounded(self, params: Params) -> Params:
        """The weights as the module uses them, with kernels and embedding tables cast to its dtype.

        Biases, the scales of normalizations and the module's `head`, which computes in float32, are
        returned unchanged.
        """
        dtype, head = self.module.dtype, self.module.head  # type: ignore[attr-defined]

        def rounded(leaf: jax.Array) -> jax.Array:
            return leaf.astype(dtype) if leaf.ndim > 1 else leaf

        return {
            name: each if name == head else jax.tree.map(rounded, each)
            for name, each in params.items()
        }

    def denoiser(
        self,
        params: Params,
        *,
        null: Condition | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> Denoiser:
        """The denoiser with these weights, in training mode if dropout_keys [B] are given.

        null: the null condition; by default, the label `num_classes`.
        """
        if null is None:
            null = self.null
        params = self.rounded(params)

        def predict(
            z: jax.Array, t: jax.Array, condition: Condition, w: jax.Array | None
        ) -> Prediction:
            log_snr = self.schedule(t)
            takes_timesteps = self.module.takes_timesteps  # type: ignore[attr-defined]
            time = timestep_index(t) if takes_timesteps else log_snr
            if dropout_keys is None:
                output: Any = self.module.apply({"params": params}, z, time, condition, w)
            else:
                train = functools.partial(apply_with_dropout, self.module, params, dropout_keys)
                output = train(z, time, condition, w)
            return prediction_from(output, source=self.parameterization, z=z, log_snr=log_snr)

        return Denoiser(
            predict, guided=self.w_conditioned, null=None if self.w_conditioned else null
        )

    def conditioned_on_w(self, embedding: str = "fourier") -> "Network":
        """The same network, conditioned on the guidance weight w; embedding: a key of W_FEATURES."""
        module = self.module.clone(w_conditioned=True, w_embedding=embedding)
        return replace(self, module=module, w_conditioned=True)

    def with_dropout(self, rate: float) -> "Network":
        """The same network with this dropout rate, which applies when dropout keys are given."""
        return replace(self, module=self.module.clone(dropout=rate))


def apply_with_dropout(module: nn.Module, params: Params, keys: jax.Array, *examples: Any) -> Any:
    """Apply the module in training mode to examples [B, ...]; each draws its masks from its own key [B].

    So the masks don't depend on how the batch is split over devices.
    """

    def of_one(key: jax.Array, *example: Any) -> Any:
        batch_of_one = jax.tree.map(lambda array: array[None], example)
        output = module.apply({"params": params}, *batch_of_one, train=True, rngs={"dropout": key})
        return jax.tree.map(lambda array: array[0], output)

    return jax.vmap(of_one)(keys, *examples)


def build_network(
    *,
    name: str,
    options: Mapping[str, Any],
    parameterization: str,
    schedule: Schedule,
    dtype: str,
    outline: Outline,
) -> Network:
    """Return a network for data with this outline, not conditioned on w.

    options: fields of the module's class. Raises UserError if the name or an option is unknown, if an
    option is missing or has the wrong type, or if the network doesn't take the data's conditions.
    """
    if name not in MODELS:
        raise UserError(f"config.model.name is {name!r}; choose one of {', '.join(MODELS)}")
    kind: Any = MODELS[name]
    check_options("config.model.options", options, kind, fixed=NOT_OPTIONS)
    for condition in outline.condition_shapes:
        if condition not in kind.conditions:
            raise UserError(
                f"config.model.name is {name}, which takes the conditions "
                f"{' and '.join(kind.conditions)}, but the data have {condition}: choose another "
                f"network or other data"
            )
    return Network(
        module=kind(
            num_classes=outline.num_classes,
            num_outputs=2 if parameterization == "x_and_eps" else 1,
            dtype=jnp.dtype(dtype),
            **options,
        ),
        schedule=schedule,
        parameterization=parameterization,
        data_shape=outline.shape,
        num_classes=outline.num_classes,
        w_conditioned=False,
        condition_shapes=tuple(sorted(outline.condition_shapes.items())),
        latent=outline.latent,
    )


def check_options(
    key: str, options: Mapping[str, Any], kind: type[nn.Module], *, fixed: Collection[str]
) -> None:
    """Check a module's options. fixed: fields of the module that are not options.

    Raises UserError, naming the key, if an option is unknown, missing or of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in fixed}
    for option in sorted(options.keys() - fields.keys()):
        raise UserError(
            f"{key}.{option} is not an option of {kind.__name__}: choose from {', '.join(fields)}"
        )
    for option, field in fields.items():
        if option in options:
            kinds.parse_value(f"{key}.{option}", options[option], field.type)
        elif field.default is MISSING:
            raise UserError(
                f"{key}.{option} is missing: set it, because {kind.__name__} requires it"
            )


def check_network(network: Network) -> None:
    """Check that a network can be built and fits its data; only shapes are computed.

    Raises UserError, naming the option, if it can't or doesn't.
    """
    shape = " x ".join(map(str, network.data_shape))
    what = f"{type(network.module).__name__} for data of {shape}"
    if len(network.data_shape) != 3 and hasattr(network.module, "misfits"):
        raise UserError(
            f"config.model.name makes a {what}, but it takes images: choose mlp, or other data"
        )
    key = jax.eval_shape(jax.random.key, 0)
    shapes = functools.partial(jax.eval_shape, network.conditioned_on_w().init, key)
    check_module("config.model.options", network.module, what, shapes, shape=network.data_shape)


def check_module(
    where: str, module: nn.Module, what: str, evaluate: Callable[[], Any], *, shape: tuple[int, ...]
) -> Any:
    """Check a module built from the options under the key `where`; return what `evaluate` returns.

    shape: the data's. Raises UserError, naming the option, if an option is out of range or the module's
    `misfits`, if it has that method, yields a message; naming `where`, if `evaluate` raises any error.
    """
    for field in dataclasses.fields(module):
        kinds.check(f"{where}.{field.name}", getattr(module, field.name), field.type)
    misfits: Any = getattr(module, "misfits", lambda shape: ())
    for misfit in misfits(shape):
        raise UserError(f"{where}.{misfit}")
    try:
        return evaluate()
    except Exception as error:  # Layers, which may be the user's own, raise many types of error.
        first, *_ = str(error).splitlines() or [""]
        raise UserError(
            f"{where} can't build a {what} ({type(error).__name__}: {first}): change these options"
        ) from error


def student_params(student: Params, teacher: Params) -> Params:
    """The student's initial weights: the teacher's, and its own where the teacher has none.

    Because the projection of w starts at zero, the stage-one student equals its conditional teacher at
    every w. Raises ValueError if the student lacks one of the teacher's weights or has another shape
    for it.
    """
    flat_student = flatten_dict(student)
    for path, value in flatten_dict(teacher).items():
        if path not in flat_student or flat_student[path].shape != value.shape:
            raise ValueError(f"the student has no place for its teacher's weight {path}")
        flat_student[path] = value
    return unflatten_dict(flat_student)
