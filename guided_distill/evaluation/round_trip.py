"""`round_trip.csv`: the error of images that are encoded to noise and decoded again.

Meng et al. 2023, the section on encoding: encoder and decoder students, and DDIM in both directions.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from etils import epath

from guided_distill.config import Evaluation, Experiment
from guided_distill.data import sources
from guided_distill.data.source import Examples
from guided_distill.diffusion.guidance import Condition
from guided_distill.diffusion.samplers import ENCODE
from guided_distill.evaluation.tables import read_rows, write_rows
from guided_distill.runs.folder import read_config
from guided_distill.runs.trained import Trained, load_finished
from guided_distill.sampling.request import Request
from guided_distill.sampling.sample import encode, sample
from guided_distill.stages import all_stages
from guided_distill.training.progress import progress
from guided_distill.training.record import checkpoint_id

PLAIN_STEPS = 256
"""A number of steps at which plain DDIM loses hardly anything."""

MAX_IMAGES = 512
"""Enough images to estimate the error to within a percent or two."""


@dataclass(frozen=True)
class RoundTrip:
    """A row: encoder and decoder are folders of stages, each run with num_steps steps at weight w.

    rms_error: root of the mean squared difference over all values of n test examples, with pixels in
    [-1, 1]. seed: selects the examples if the test split has more than n. checkpoints: the encoder's and
    the decoder's; earlier versions didn't write them.
    """

    encoder: str
    decoder: str
    num_steps: int
    w: float
    rms_error: float
    n: int
    seed: int
    checkpoints: str | None = None

    @property
    def key(self) -> tuple[str, str, int, float, int, int]:
        """What identifies the row: a new row replaces an older one with the same key."""
        return (self.encoder, self.decoder, self.num_steps, self.w, self.n, self.seed)


class Pair(NamedTuple):
    """The two directions of a round trip: folders of stages, and their number of steps."""

    encoder: str
    decoder: str
    num_steps: int


def evaluate_round_trips(
    workdir: epath.Path,
    settings: Evaluation | None = None,
    stages: Collection[str] | None = None,
    *,
    again: bool = False,
) -> list[RoundTrip]:
    """Write `round_trip.csv` row by row; rows of the same checkpoints are kept unless `again` is set.

    settings: replace the config's; num_samples, batch_size, weights and seed are used. stages: restrict
    the encoders to these folders, and plain DDIM to their numbers of steps. A run without an encoder and
    a decoder of the same number of steps has no rows, and no file is written. Raises UserError if the
    folder holds no run, or an unfinished stage.
    """
    experiment = read_config(workdir)
    settings = settings or experiment.evaluation
    pairs = _pairs(workdir, experiment, stages)
    trips = [(pair, w) for pair in pairs for w in settings.weights]
    if not trips:
        return []
    data = experiment.data
    test = sources.load_source(
        data.name, split="test", image_size=data.image_size, seed=experiment.seed
    )
    count = min(settings.num_samples, test.size, MAX_IMAGES)
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(test.size)[:count])
    path = workdir / "round_trip.csv"
    rows = read_rows(path, RoundTrip)
    ways: dict[str, Trained] = {}
    with progress("round trips", total=len(trips), unit="rows") as advance:
        for done, (pair, w) in enumerate(trips, start=1):
            words = ""
            names = (pair.encoder, pair.decoder)
            checkpoints = "-".join(checkpoint_id(workdir / name) for name in names)
            key = (*pair, w, count, settings.seed)
            known = any(row.key == key and row.checkpoints in (None, checkpoints) for row in rows)
            if again or not known:
                ways = {name: ways.get(name) or load_finished(workdir / name) for name in names}
                travel = functools.partial(
                    round_trip,
                    ways[pair.encoder],
                    ways[pair.decoder],
                    w=w,
                    num_steps=pair.num_steps,
                    batch_size=settings.batch_size,
                )
                error = _rms_error(travel, test.chunks_of(chosen))
                others = [row for row in rows if row.key != key]
                rows = [
                    *others,
                    RoundTrip(*pair, w, error, count, settings.seed, checkpoints),
                ]
                write_rows(path, RoundTrip, rows)
                words = f"{pair.encoder} {pair.decoder} N={pair.num_steps} w={w:g}: {error:.4f}"
            advance(done, words)
    return rows


def round_trip(
    encoder: Trained,
    decoder: Trained,
    images: np.ndarray,
    *,
    condition: Condition,
    w: float,
    num_steps: int,
    batch_size: int,
) -> np.ndarray:
    """Return the images [n, ...] encoded and decoded again, with num_steps steps each at weight w."""
    request = Request(condition, w, num_steps=num_steps, batch_size=batch_size)
    noise = encode(encoder, images, request)
    return sample(decoder, dataclasses.replace(request, noise=noise))


def _pairs(
    workdir: epath.Path, experiment: Experiment, wanted: Collection[str] | None
) -> Iterator[Pair]:
    """Yield the students of each N that has both; then plain DDIM at the same N and at many steps."""
    stages = [stage for stage in all_stages(experiment) if (workdir / stage.name).exists()]
    encoders, decoders = (
        {
            stage.num_steps: stage.name
            for stage in stages
            if stage.sampler == sampler and stage.num_steps
        }
        for sampler in (ENCODE, "ddim")
    )
    both = [
        n
        for n, encoder in encoders.items()
        if n in decoders and (wanted is None or encoder in wanted)
    ]
    if not both:
        return
    for n in both:
        yield Pair(encoders[n], decoders[n], n)
    plain = [stage.name for stage in stages if stage.num_steps is None]
    for n in (*both, PLAIN_STEPS) if plain else ():
        yield Pair(plain[-1], plain[-1], n)


def _rms_error(travel: Callable[..., np.ndarray], chunks: Iterable[Examples]) -> float:
    squared, count = 0.0, 0
    for examples in chunks:
        images = examples.pop("image")
        back = travel(images, condition=examples)
        squared += float(np.sum(np.square(back - images), dtype=np.float64))
        count += images.size
    return float(np.sqrt(squared / count))
