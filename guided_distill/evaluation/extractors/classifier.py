"""The extractor of a run's own data: a small classifier, trained on the data from a fixed seed."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from guided_distill import draws
from guided_distill.data.source import Source, within_memory
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.models.registry import apply_with_dropout
from guided_distill.objectives.stage import Optimization
from guided_distill.objectives.weighting import Loss
from guided_distill.training.job import Cadence, Job
from guided_distill.training.mesh import data_mesh
from guided_distill.training.session import train_in
from guided_distill.training.state import make_optimizer
from guided_distill.training.step import make_train_step

SEED = 20230618
FEATURES = 64
SETTINGS = Optimization(
    steps=1500,
    batch_size=128,
    learning_rate=2e-3,
    learning_rate_schedule="cosine",
    weight_decay=1e-4,
)
CADENCE = Cadence(
    steps_per_dispatch=1,
    log_every=100,
    checkpoint_every=500,
    checkpoints_to_keep=1,
    max_nonfinite_steps=10,
)
NOISE = 0.1
BATCH = 512
SCALE_EXAMPLES = 10_000


class Classifier(nn.Module):
    """Strided convolutions down to 4x4 (none for points in the plane), a feature layer, and logits."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """x [B, ...] -> (features [B, 64], logits [B, num_classes])."""
        hidden, width = x, 32
        while hidden.ndim == 4 and hidden.shape[1] > 4:
            hidden = nn.relu(nn.Conv(width, (3, 3), strides=(2, 2))(hidden))
            width *= 2
        hidden = hidden.reshape(len(x), -1)
        hidden = nn.relu(nn.Dense(128)(hidden))
        hidden = nn.Dropout(0.2, deterministic=not train)(hidden)
        features = nn.relu(nn.Dense(FEATURES)(hidden))
        return features, nn.Dense(self.num_classes)(features)


def _apply(
    classifier: Classifier, params: Mapping[str, Any], samples: jax.Array
) -> tuple[jax.Array, jax.Array]:
    outputs: Any = classifier.apply({"params": params["classifier"]}, samples)
    features, logits = outputs
    return (samples if samples.ndim == 2 else params["scale"] * features), logits


def classifier_extractor(
    classifier: Classifier, params: Any, shape: tuple[int, ...], *, scale: float
) -> Extractor:
    """The extractor for samples of `shape`. The features of points in the plane are their coordinates."""
    points = len(shape) == 1
    return Extractor(
        name="coordinates" if points else f"classifier-{FEATURES}d",
        width=shape[0] if points else FEATURES,
        own_classes=True,
        apply=functools.partial(_apply, classifier),
        params={"classifier": params, "scale": jnp.float32(scale)},
        batch_size=within_memory(shape, most=BATCH),
    )


def classifier_loss(classifier: Classifier, params: Any, batch: Any, keys: jax.Array) -> Loss:
    """Cross-entropy of the labels given slightly noisy examples; aux: "accuracy"."""
    noise_keys, dropout_keys = draws.split(keys, 2)
    x = batch["image"] + NOISE * draws.normals(noise_keys, batch["image"].shape[1:])
    _, logits = apply_with_dropout(classifier, params, dropout_keys, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = logits.argmax(axis=-1) == batch["label"]
    return Loss(losses, {"accuracy": correct.astype(jnp.float32)})


def train_extractor(
    source: Source, directory: epath.Path, *, steps: int = SETTINGS.steps
) -> Extractor:
    """The extractor for a run's training data, trained in `directory` unless that holds it already.

    Features are scaled to a mean square of 1 over the training data, so that distances of different runs
    have similar sizes. For points in the plane the classifier provides only the logits.
    """
    classifier = Classifier(source.num_classes)
    mesh = data_mesh()
    init_key, loss_key = jax.random.split(draws.key_of(SEED))
    job = Job(
        directory,
        title="classifier",
        about={"stage": "classifier", "seed": SEED},
        settings=SETTINGS,
        total_steps=steps,
        seed=SEED,
        key=loss_key,
        cadence=CADENCE,
        mesh=mesh,
    )

    def initial() -> Any:
        return classifier.init(init_key, jnp.zeros((1, *source.shape)))["params"]

    optimizer = make_optimizer(SETTINGS, steps=steps)
    step = make_train_step(
        lambda params, frozen, batch, keys: classifier_loss(classifier, params, batch, keys),
        optimizer,
        ema_decay=0.0,
        mesh=mesh,
    )
    state = train_in(
        job,
        source,
        (step, optimizer),
        shapes=jax.eval_shape(initial),
        initial=initial,
        frozen={},
    )
    make = functools.partial(classifier_extractor, classifier, state.params, source.shape)
    extractor = make(scale=1.0)
    chunks = source.chunks(SCALE_EXAMPLES)
    features = np.concatenate([extractor(examples["image"])[0] for examples in chunks])
    return make(scale=float(np.mean(np.square(features))) ** -0.5)
