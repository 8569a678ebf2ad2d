"""From a data source, an autoencoder and a text encoder to the folders of `data/encoded.py`."""

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from guided_distill.data import sources
from guided_distill.data.encoded import (
    ABOUT,
    CAPTIONS,
    INPAINT,
    NULL,
    NUMBERS,
    Encoding,
    read_about,
    shards,
)
from guided_distill.data.source import SPLITS, Source
from guided_distill.errors import UserError
from guided_distill.formats.diffusers_autoencoder import read_autoencoder
from guided_distill.models.stable_diffusion.autoencoder import AutoencoderKL, VQModel
from guided_distill.models.weights import weights_fingerprint
from guided_distill.places import local_path_named
from guided_distill.prepare.masks import random_mask
from guided_distill.storage import storage_error, whole, write_bytes, write_text
from guided_distill.text.registry import load_text_encoder
from guided_distill.training.progress import progress

ToLatents = Callable[[np.ndarray], np.ndarray]
"""Images [B, H, W, C] in [-1, 1] -> latents [B, h, w, c]; one b at a time, B is always the same."""

ToStates = Callable[[Sequence[str]], np.ndarray]
"""Prompts [n] -> states [n, L, D]."""

# Latents and states don't compress, and are read one by one.
_OPTIONS = "group_size:1,uncompressed"


@dataclass(frozen=True)
class EncodeRequest:
    """What to encode, and how.

    data, image_size: as of `data.sources.load`. text_encoder: as of `load_text_encoder`; without one,
    labels are the condition. mirrored: encode every training image in both orientations. batch_size:
    images encoded at once. shard_size: examples in a file. inpaint: encode every image without what a
    random mask hides, too.
    """

    data: str
    image_size: int | None
    text_encoder: str | None
    mirrored: bool
    batch_size: int
    shard_size: int
    inpaint: bool = False


def encode(out: epath.Path, request: EncodeRequest, *, autoencoder: epath.Path) -> None:
    """Encode both splits of the data into the folder `out`; the same call resumes.

    autoencoder: folder of a diffusers autoencoder. Raises UserError for bad sizes, and what the parts
    raise.
    """
    local_path_named(str(out), "encoded data")
    for flag, value in (("--batch_size", request.batch_size), ("--shard_size", request.shard_size)):
        if value < 1:
            raise UserError(f"{flag} is {value}: it must be at least 1")
    splits = {
        split: sources.load(request.data, split=split, image_size=request.image_size)
        for split in sources.SPLITS
    }
    shape = splits["train"].shape
    if request.text_encoder and splits["train"].captions is None:
        raise UserError(
            f"{request.data} has no captions to encode: leave --text_encoder out, or add a field "
            "`caption` to an npz file"
        )
    module, params = read_autoencoder(autoencoder)
    if len(shape) != 3 or shape[-1] != module.image_channels:
        raise UserError(
            f"{autoencoder} takes images of {module.image_channels} channels, and an example of "
            f"{request.data} is {list(shape)}"
        )
    check_image_shape(module, splits["train"])
    encoder = load_text_encoder(request.text_encoder) if request.text_encoder else None
    run = jax.jit(functools.partial(module.apply, method="to_latents"))
    latents = jax.eval_shape(
        run, {"params": params}, jax.ShapeDtypeStruct((request.batch_size, *shape), np.float32)
    )

    def to_latents(images: np.ndarray) -> np.ndarray:
        return np.asarray(run({"params": params}, images))

    encoding = Encoding(
        data=request.data,
        image_size=request.image_size,
        autoencoder=weights_fingerprint(module, params),
        text_encoder=weights_fingerprint(encoder.shape, encoder.params) if encoder else None,
        shape=latents.shape[1:],
        text_shape=encoder.shape if encoder else None,
        class_names=splits["train"].class_names,
        mirrored=request.mirrored,
        sizes={split: len(source) for split, source in splits.items()},
        shard_size=request.shard_size,
        inpaint=request.inpaint,
    )
    write(
        out,
        encoding,
        splits,
        to_latents=to_latents,
        to_states=encoder.encode if encoder else None,
        batch_size=request.batch_size,
    )


def check_image_shape(module: AutoencoderKL | VQModel, source: Source) -> None:
    """Raises UserError unless the autoencoder can halve the images, which have to be squares."""
    halvings = len(module.block_out_channels) - 1
    height, width, *_ = (*source.shape, 0)
    if len(source.shape) != 3 or height != width or height % 2**halvings:
        raise UserError(
            f"the autoencoder halves square images {halvings} times, but those of {source.name} are "
            f"{' x '.join(map(str, source.shape))}: set data.image_size to a multiple of {2**halvings}"
        )


def write(
    out: epath.Path,
    encoding: Encoding,
    splits: Mapping[str, Source],
    *,
    to_latents: ToLatents,
    to_states: ToStates | None,
    batch_size: int,
) -> None:
    """Encodes all splits into the folder `out`; finished shards are left as they are.

    Args:
      encoding: what will be there.
      splits: the source of each, with captions.
      to_states: encodes captions; without it, labels are the condition.
      batch_size: images of one call of to_latents.

    Raises:
      UserError: out holds another encoding, or latents are not finite.
    """
    _write_about(out, encoding)
    for split, source in splits.items():
        folder = out / split
        latents = _Latents(encoding, source, split, to_latents, batch_size)
        _write_shards(folder, "image", latents, encoding.shard_size)
        if to_states is not None:
            assert source.captions is not None
            captions = [str(caption) for caption in source.captions]
            _write_captions(folder / CAPTIONS, captions)
            states = _States(sorted(set(captions)), to_states)
            _write_shards(folder, "text", states, encoding.shard_size)
    if to_states is not None and not (out / NULL).exists():
        null = io.BytesIO()
        np.save(null, to_states([""])[0])
        write_bytes(out / NULL, null.getvalue())


@dataclass(frozen=True)
class _Latents:
    """The records of a split, some at a time."""

    encoding: Encoding
    source: Source
    split: str
    to_latents: ToLatents
    batch_size: int

    def __len__(self) -> int:
        return self.encoding.copies(self.split) * len(self.source)

    def __call__(self, start: int, stop: int) -> Iterator[list[bytes]]:
        copies = self.encoding.copies(self.split)
        for first in range(start, stop, self.batch_size):
            numbers = np.arange(first, min(first + self.batch_size, stop))
            examples = self.source.read(numbers // copies)
            images, mirrored = examples["image"], numbers % copies == 1
            images[mirrored] = images[mirrored, :, ::-1]
            records = np.empty(len(images), self.encoding.record)
            records["image"], records["label"] = self._latents(images), examples["label"]
            if self.encoding.inpaint:
                masks = np.stack([self._mask(int(number)) for number in numbers])[..., None]
                # The nearest pixel of the mask, as diffusers takes it.
                size = images.shape[1] // self.encoding.shape[0]
                around = self._latents(np.where(masks, 0.0, images).astype(np.float32))
                records[INPAINT] = np.concatenate([masks[:, ::size, ::size], around], axis=-1)
            yield [record.tobytes() for record in records]

    def _latents(self, images: np.ndarray) -> np.ndarray:
        padding = [(0, self.batch_size - len(images))] + [(0, 0)] * (images.ndim - 1)
        latents = self.to_latents(np.pad(images, padding))[: len(images)]
        if not np.all(np.abs(latents) <= np.finfo(NUMBERS).max):
            raise UserError(
                f"{self.encoding.autoencoder} makes latents of {self.source.name} that are not "
                "finite in half precision: it is damaged, or its scaling_factor is wrong"
            )
        return latents

    def _mask(self, number: int) -> np.ndarray:
        rng = np.random.default_rng([SPLITS.index(self.split), number])
        return random_mask(rng, *self.source.shape[:2])


@dataclass(frozen=True)
class _States:
    """The records of captions, some at a time."""

    captions: list[str]
    to_states: ToStates

    def __len__(self) -> int:
        return len(self.captions)

    def __call__(self, start: int, stop: int) -> Iterator[list[bytes]]:
        for first in range(start, stop, 256):
            states = self.to_states(self.captions[first : min(first + 256, stop)])
            yield [each.tobytes() for each in states.astype(NUMBERS)]


def _write_shards(folder: epath.Path, kind: str, records: _Latents | _States, size: int) -> None:
    missing = [each for each in shards(folder, kind, len(records), size) if not each.path.exists()]
    there = len(records) - sum(stop - start for _, start, stop in missing)
    title = f"{folder.name} {kind}"
    with progress(title, total=len(records), unit="records", done=there) as advance:
        for path, start, stop in missing:
            with contextlib.ExitStack() as written:
                with _storing(path):
                    writer = ArrayRecordWriter(str(written.enter_context(whole(path))), _OPTIONS)
                for some in records(start, stop):
                    with _storing(path):
                        for record in some:
                            writer.write(record)
                    there += len(some)
                    advance(there, "")
                with _storing(path):
                    writer.close()
                    written.close()


@contextlib.contextmanager
def _storing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # The writer's own is a RuntimeError.
        raise storage_error(path, error) from error


def _write_about(out: epath.Path, encoding: Encoding) -> None:
    path = out / ABOUT
    if path.exists():
        found = read_about(out)
        for field in dataclasses.fields(Encoding):
            old, new = getattr(found, field.name), getattr(encoding, field.name)
            if old != new:
                raise UserError(
                    f"{out} holds an encoding whose {field.name} is {old}, not {new}: give another "
                    "--out, or remove that folder"
                )
    write_text(path, json.dumps(dataclasses.asdict(encoding), indent=2))


def _write_captions(path: epath.Path, captions: list[str]) -> None:
    """Raises UserError if others are there: finished shards hold the states of those."""
    content = json.dumps(captions)
    if path.exists() and path.read_text() != content:
        raise UserError(
            f"{path} holds other captions than the data have now: remove the folder {path.parent.parent} "
            f"to encode them anew, or give another --out"
        )
    write_text(path, content)
