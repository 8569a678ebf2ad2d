"""Encodes a data source with an autoencoder and a text encoder, for `data/encoded.py` to read."""

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
"""Images [B, H, W, C] in [-1, 1] -> latents [B, h, w, c]; B is the same in every call."""

ToStates = Callable[[Sequence[str]], np.ndarray]
"""Prompts [n] -> states [n, L, D]."""

# Latents and states don't compress, and they are read one record at a time.
_OPTIONS = "group_size:1,uncompressed"


@dataclass(frozen=True)
class EncodeRequest:
    """What to encode, and how.

    data, image_size: see `load_source`. text_encoder: see `load_text_encoder`; with None, the condition
    is the label. mirrored: also encode the mirror image of every training image. batch_size: images
    encoded per call. shard_size: examples per file. inpaint: also encode every image with a random
    region masked out.
    """

    data: str
    image_size: int | None
    text_encoder: str | None
    mirrored: bool
    batch_size: int
    shard_size: int
    inpaint: bool = False


def encode_data(out: epath.Path, request: EncodeRequest, *, autoencoder: epath.Path) -> None:
    """Encodes both splits of the data into the folder `out`; the same call resumes.

    autoencoder: folder of a diffusers autoencoder. Raises UserError if a size is below 1, if the data,
    the autoencoder or the text encoder can't be read, or if they don't fit each other.
    """
    local_path_named(str(out), "encoded data")
    for flag, value in (("--batch_size", request.batch_size), ("--shard_size", request.shard_size)):
        if value < 1:
            raise UserError(f"{flag} is {value}: make it at least 1")
    splits = {
        split: sources.load_source(request.data, split=split, image_size=request.image_size)
        for split in sources.SPLITS
    }
    shape = splits["train"].shape
    if request.text_encoder and splits["train"].captions is None:
        raise UserError(
            f"{request.data} has no captions to encode: leave out --text_encoder, or add the field "
            "`caption` to the npz file"
        )
    module, params = read_autoencoder(autoencoder)
    if len(shape) != 3 or shape[-1] != module.image_channels:
        raise UserError(
            f"{autoencoder} takes images of {module.image_channels} channels, but examples of "
            f"{request.data} are {list(shape)}: choose another --data or --autoencoder"
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
    write_encoding(
        out,
        encoding,
        splits,
        to_latents=to_latents,
        to_states=encoder.encode if encoder else None,
        batch_size=request.batch_size,
    )


def check_image_shape(module: AutoencoderKL | VQModel, source: Source) -> None:
    """Raises UserError unless the images are squares whose side the autoencoder can halve."""
    halvings = len(module.block_out_channels) - 1
    height, width, *_ = (*source.shape, 0)
    if len(source.shape) != 3 or height != width or height % 2**halvings:
        raise UserError(
            f"the autoencoder halves square images {halvings} times, but examples of {source.name} are "
            f"{' x '.join(map(str, source.shape))}: set data.image_size to a multiple of {2**halvings}"
        )


def write_encoding(
    out: epath.Path,
    encoding: Encoding,
    splits: Mapping[str, Source],
    *,
    to_latents: ToLatents,
    to_states: ToStates | None,
    batch_size: int,
) -> None:
    """Encodes all splits into the folder `out`; finished shards are kept.

    Args:
      encoding: describes the data to write.
      splits: the source of each split, with captions where to_states is given.
      to_states: encodes captions; with None, the condition is the label.
      batch_size: images per call of to_latents.

    Raises:
      UserError: out holds another encoding, or latents are not finite in half precision.
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
    """The image records of a split; a call yields those from `start` up to `stop` in batches."""

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
                # diffusers also resizes masks by taking the nearest pixel.
                size = images.shape[1] // self.encoding.shape[0]
                masked = self._latents(np.where(masks, 0.0, images).astype(np.float32))
                records[INPAINT] = np.concatenate([masks[:, ::size, ::size], masked], axis=-1)
            yield [record.tobytes() for record in records]

    def _latents(self, images: np.ndarray) -> np.ndarray:
        padding = [(0, self.batch_size - len(images))] + [(0, 0)] * (images.ndim - 1)
        latents = self.to_latents(np.pad(images, padding))[: len(images)]
        if not np.all(np.abs(latents) <= np.finfo(NUMBERS).max):
            raise UserError(
                f"the autoencoder {self.encoding.autoencoder} encodes {self.source.name} to latents that "
                "are not finite in half precision: check its weights and its scaling_factor"
            )
        return latents

    def _mask(self, number: int) -> np.ndarray:
        rng = np.random.default_rng([SPLITS.index(self.split), number])
        return random_mask(rng, *self.source.shape[:2])


@dataclass(frozen=True)
class _States:
    """The text records of a split; a call yields those from `start` up to `stop` in batches."""

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
    done = len(records) - sum(stop - start for _, start, stop in missing)
    title = f"{folder.name} {kind}"
    with progress(title, total=len(records), unit="records", done=done) as advance:
        for path, start, stop in missing:
            with contextlib.ExitStack() as written:
                with _storing(path):
                    writer = ArrayRecordWriter(str(written.enter_context(whole(path))), _OPTIONS)
                for batch in records(start, stop):
                    with _storing(path):
                        for record in batch:
                            writer.write(record)
                    done += len(batch)
                    advance(done, "")
                with _storing(path):
                    writer.close()
                    written.close()


@contextlib.contextmanager
def _storing(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecordWriter raises RuntimeError.
        raise storage_error(path, error) from error


def _write_about(out: epath.Path, encoding: Encoding) -> None:
    path = out / ABOUT
    if path.exists():
        found = read_about(out)
        for field in dataclasses.fields(Encoding):
            old, new = getattr(found, field.name), getattr(encoding, field.name)
            if old != new:
                raise UserError(
                    f"{out} holds an encoding whose {field.name} is {old}, not {new}: choose another "
                    "--out, or remove that folder"
                )
    write_text(path, json.dumps(dataclasses.asdict(encoding), indent=2))


def _write_captions(path: epath.Path, captions: list[str]) -> None:
    """Raises UserError if the folder holds other captions; its shards contain their states."""
    content = json.dumps(captions)
    if path.exists() and path.read_text() != content:
        raise UserError(
            f"{path} holds captions that differ from the data's: remove the folder {path.parent.parent} "
            f"to encode again, or choose another --out"
        )
    write_text(path, content)
