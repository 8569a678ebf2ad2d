"""The feature space of an evaluation: a small classifier, trained from a fixed seed on the run's data."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from guided_distill.config import Optimization
from guided_distill.data.pipeline import batches
from guided_distill.data.source import Source
from guided_distill.objectives.weighting import Loss
from guided_distill.training.checkpoints import StageCheckpoints, abstract
from guided_distill.training.loop import train
from guided_distill.training.mesh import data_mesh, replicated
from guided_distill.training.metrics import MetricsLog
from guided_distill.training.state import initial_state, make_optimizer
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
NOISE = 0.1
BATCH = 512
SCALE_EXAMPLES = 10_000


class Classifier(nn.Module):
    """Strided convolutions down to 4x4 (points in the plane: none), a feature layer, logits."""

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


@dataclass(frozen=True)
class Extractor:
    """A trained classifier: what maps samples to features and to classes.

    name: what results say they were measured with. scale: multiplies the features, so that their mean
    square over the training data is 1 and distances read alike from run to run.
    """

    name: str
    classifier: Classifier
    params: Mapping[str, Any]
    scale: float = 1.0

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples [n, ...] -> (features [n, D], predicted classes [n])."""
        chunks = [
            _apply(self.classifier, self.params, _pad(samples[start : start + BATCH]))
            for start in range(0, len(samples), BATCH)
        ]
        features, logits = (
            np.concatenate([np.asarray(part) for part in parts])[: len(samples)]
            for parts in zip(*chunks, strict=True)
        )
        points = samples.ndim == 2
        return (samples if points else self.scale * features), logits.argmax(axis=-1)


def _pad(samples: np.ndarray) -> np.ndarray:
    missing = BATCH - len(samples)
    return np.pad(samples, [(0, missing)] + [(0, 0)] * (samples.ndim - 1))


@jax.jit(static_argnums=0)
def _apply(
    classifier: Classifier, params: Mapping[str, Any], samples: jax.Array
) -> tuple[jax.Array, jax.Array]:
    outputs: Any = classifier.apply({"params": params}, samples)
    return outputs


def classifier_loss(classifier: Classifier, params: Any, batch: Any, key: jax.Array) -> Loss:
    """Cross-entropy of the labels given slightly noisy examples; aux: "accuracy"."""
    noise_key, dropout_key = jax.random.split(key)
    x = batch["image"] + NOISE * jax.random.normal(noise_key, batch["image"].shape)
    logits: Any = classifier.apply(
        {"params": params}, x, train=True, rngs={"dropout": dropout_key}
    )[1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = logits.argmax(axis=-1) == batch["label"]
    return Loss(losses, {"accuracy": correct.astype(jnp.float32)})


def train_extractor(
    source: Source, directory: epath.Path, *, steps: int = SETTINGS.steps
) -> Extractor:
    """The extractor for a run's training data, trained into `directory` unless it is there already.

    Points in the plane are their own features; the classifier then gives the accuracy alone.
    """
    classifier = Classifier(source.num_classes)
    name = "coordinates" if len(source.shape) == 1 else f"classifier-{FEATURES}d"
    mesh = data_mesh()
    init_key, loop_key = jax.random.split(jax.random.key(SEED))
    params = classifier.init(init_key, jnp.zeros((1, *source.shape)))["params"]
    optimizer = make_optimizer(SETTINGS, steps=steps)
    state = jax.device_put(initial_state(params, optimizer, ema_decay=0.0), replicated(mesh))
    step = make_train_step(
        lambda params, frozen, batch, key: classifier_loss(classifier, params, batch, key),
        optimizer,
        ema_decay=0.0,
        mesh=mesh,
    )
    iterator = batches(source, batch_size=SETTINGS.batch_size, seed=SEED)
    with contextlib.closing(iterator), StageCheckpoints(directory, keep=1) as checkpoints:
        restored = checkpoints.restore(abstract(state, replicated(mesh)))
        if restored is not None:
            state = restored.state
            iterator.set_state(restored.data_state)
        with contextlib.closing(MetricsLog(directory, step=int(state.step))) as metrics_log:
            state = train(
                state,
                step,
                frozen={},
                batches=iterator,
                key=loop_key,
                total_steps=steps,
                steps_per_dispatch=50,
                log_every=100,
                checkpoint_every=500,
                max_nonfinite_steps=10,
                checkpoints=checkpoints,
                about={"stage": "classifier", "seed": SEED},
                metrics_log=metrics_log,
                mesh=mesh,
                title="classifier",
            )
    extractor = Extractor(name, classifier, state.params)
    features, _ = extractor(source.arrays(SCALE_EXAMPLES)[0])
    return replace(extractor, scale=float(np.mean(np.square(features))) ** -0.5)
