"""The reference for samples: statistics of the training data, computed once and kept in a file.

The file is an npz of `mean` [D], `covariance` [D, D] and `count` of up to 50,000 training examples,
`features` of a fixed subset of at most 10,000 of them, and their origin: `extractor`, `weights` (a
SHA-256 of the extractor's weights), `shape` and `data` (a SHA-256 of the data), with a `checksum` over
all of these. The npz of the FID literature, which holds only `mu` and `sigma`, can be read too.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from etils import epath

from guided_distill.config import Experiment
from guided_distill.data import sources
from guided_distill.data.encoded import read_about
from guided_distill.data.source import Source
from guided_distill.errors import UserError
from guided_distill.evaluation.extractors.extractor import Extractor
from guided_distill.evaluation.metrics.frechet import FeatureStatistics
from guided_distill.evaluation.metrics.precision_recall import MAX_SAMPLES, Manifold
from guided_distill.files import regular_file
from guided_distill.places import local_path_named
from guided_distill.storage import write_bytes
from guided_distill.training.progress import progress

MAX_EXAMPLES = 50_000
FINGERPRINT_EXAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of all examples, and features [N, D] of some, or None if there are none.

    fingerprint: 8 hex digits of a hash of the extractor's weights and of the data or the file. of: the
    name that results append to the extractor's; empty for the run's own training data.
    """

    statistics: FeatureStatistics
    features: np.ndarray | None
    fingerprint: str
    of: str = ""

    @cached_property
    def manifold(self) -> Manifold:
        """The features with the balls around them. Requires features."""
        assert self.features is not None
        return Manifold.from_features(self.features)


def open_pixels(experiment: Experiment) -> tuple[Source, Source, bool]:
    """The pixels of the training and the test split, and whether the run is conditioned on text.

    For encoded data, these are the images that were encoded. Raises UserError for an in-painting run.
    """
    data, of_texts = experiment.data, experiment.data.text_encoder is not None
    name, image_size = data.name, data.image_size
    if name.startswith("encoded:"):
        encoding = read_about(local_path_named(name.removeprefix("encoded:"), "encoded data"))
        name, image_size = encoding.data, encoding.image_size
        of_texts = encoding.text_shape is not None
        if encoding.inpaint:
            raise UserError(
                "evaluate can't measure in-painting: look at images of `guided-distill inpaint` instead"
            )
    train, test = (
        sources.load_source(name, split=split, image_size=image_size, seed=experiment.seed)
        for split in sources.SPLITS
    )
    return train, test, of_texts


def training_reference(source: Source, extractor: Extractor, folder: epath.Path) -> Reference:
    """The reference of a run's training data, read from `folder`, or computed and saved there.

    A file there is replaced if it is damaged or of other data or another extractor.
    """
    path = folder / f"{extractor.name}.npz"
    about = _about(source, extractor)
    if path.exists():
        fields = _read(path)
        if fields and _intact(fields) and all(fields[key] == about[key] for key in about):
            return _reference(fields)
    statistics, features = _compute(source, extractor)
    fields = {
        "mean": statistics.mean,
        "covariance": statistics.covariance,
        "count": np.asarray(statistics.count),
        "features": features,
        **{key: np.asarray(value) for key, value in about.items()},
    }
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **fields, checksum=np.asarray(_checksum(fields)))
    write_bytes(path, data.getvalue())
    return _reference(fields)


def read_reference(path: epath.Path, source: Source, extractor: Extractor) -> Reference:
    """Read the reference from a file that the user names.

    Raises UserError if the file is damaged, or of another extractor or image size.
    """
    fields = _read(path)
    if {"mu", "sigma"} <= fields.keys():
        _check_statistics(path, fields["mu"], fields["sigma"], extractor)
        mean, covariance = (np.asarray(fields[key], np.float64) for key in ("mu", "sigma"))
        # The format doesn't give the count; a distance requires at least two.
        statistics = FeatureStatistics(mean, covariance, count=2)
        fingerprint = _sha256([_weights(extractor), mean, covariance])[:8]
        return Reference(statistics, None, fingerprint, of=path.stem)
    if "checksum" not in fields:
        raise UserError(
            f"--reference {path} holds no statistics: give an .npz file from WORKDIR/reference, or one "
            f"with mu and sigma"
        )
    if not _intact(fields):
        raise UserError(f"--reference {path} is damaged: recreate it, or give another file")
    about = _about(source, extractor)
    _check_statistics(path, fields["mean"], fields["covariance"], extractor)
    for key, words in (("extractor", "the extractor"), ("shape", "images of shape")):
        if fields[key] != about[key]:
            raise UserError(
                f"--reference {path} is of {words} {fields[key]}, and this run needs {about[key]}: give "
                f"statistics that match"
            )
    if fields["weights"] != about["weights"]:
        raise UserError(
            f"--reference {path} was made with other weights of {extractor.name} "
            f"({str(fields['weights'])[:8]}) than are used here ({about['weights'][:8]}): recreate it"
        )
    return _reference(fields, of="" if fields["data"] == about["data"] else path.stem)


def _reference(fields: Mapping[str, np.ndarray], of: str = "") -> Reference:
    statistics = FeatureStatistics(fields["mean"], fields["covariance"], int(fields["count"]))
    fingerprint = _sha256([fields["weights"], fields["data"]])[:8]
    return Reference(statistics, fields["features"], fingerprint, of)


def _compute(source: Source, extractor: Extractor) -> tuple[FeatureStatistics, np.ndarray]:
    count = min(source.size, MAX_EXAMPLES)
    # Examples come in the source's order, which may be by class: the subset is drawn at random.
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[:MAX_SAMPLES]] = True
    statistics = FeatureStatistics.empty(extractor.width)
    kept = []
    with progress("reference", total=count, unit="images") as advance:
        for examples in source.chunks(MAX_EXAMPLES):
            features, _ = extractor(examples["image"])
            kept.append(features[chosen[statistics.count :][: len(features)]])
            statistics = statistics.accumulate(features)
            advance(statistics.count, extractor.name)
    return statistics, np.concatenate(kept)


def _about(source: Source, extractor: Extractor) -> dict[str, str]:
    return {
        "extractor": extractor.name,
        "weights": _weights(extractor),
        "shape": " x ".join(map(str, source.shape)),
        "data": data_fingerprint(source),
    }


def _weights(extractor: Extractor) -> str:
    return _sha256(jax.tree.leaves(extractor.params))


def data_fingerprint(source: Source) -> str:
    """A SHA-256 of the data's size and shape, and of 1,000 of its examples with their labels."""
    rng = np.random.default_rng(0)
    indices = np.sort(rng.permutation(source.size)[:FINGERPRINT_EXAMPLES])
    digest = hashlib.sha256()
    _update(digest, np.array([source.size, *source.shape]))
    # The same digest as that of one array of all images, which would be large.
    digest.update(f"float32 {(len(indices), *source.shape)}".encode())
    others: dict[str, list[np.ndarray]] = {}
    for examples in source.chunks_of(indices):
        digest.update(np.ascontiguousarray(examples.pop("image"), np.float32).tobytes())
        for name, each in examples.items():
            others.setdefault(name, []).append(each)
    for parts in others.values():
        _update(digest, np.concatenate(parts))
    return digest.hexdigest()


def _sha256(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        _update(digest, np.asarray(array))
    return digest.hexdigest()


def _update(digest: Any, array: np.ndarray) -> None:
    digest.update(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())


def _checksum(fields: Mapping[str, np.ndarray]) -> str:
    return _sha256(fields[key] for key in sorted(fields) if key != "checksum")


def _intact(fields: Mapping[str, np.ndarray]) -> bool:
    return "checksum" in fields and str(fields["checksum"]) == _checksum(fields)


def _read(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file; none if it can't be read or isn't a regular file."""
    if regular_file(path) is None:
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except Exception:  # Whatever damaged bytes raise in zipfile and NumPy.
        return {}


def _check_statistics(
    path: epath.Path, mean: np.ndarray, covariance: np.ndarray, extractor: Extractor
) -> None:
    width = extractor.width
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise UserError(
            f"--reference {path} has a mean {list(mean.shape)} and a covariance "
            f"{list(covariance.shape)}, and the features of {extractor.name} have width {width}: give "
            f"statistics made with the same extractor"
        )
    if not all(each.dtype.kind in "fiu" and np.isfinite(each).all() for each in (mean, covariance)):
        raise UserError(
            f"--reference {path} has a mean or covariance with values that are not finite numbers: "
            f"recreate it, or give another file"
        )
