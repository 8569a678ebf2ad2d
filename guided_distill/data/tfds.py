"""The source `tfds:`, data sets prepared by TensorFlow Datasets and read without TensorFlow."""

import numpy as np
from PIL import Image

from guided_distill.data.pixels import crop_and_resize, from_uint8
from guided_distill.data.source import Examples, Source
from guided_distill.errors import UserError


def load_tfds(name: str, *, split: str, image_size: int | None) -> Source:
    """Opens a data set with the feature `image`, uint8 with 1 or 3 channels, and optionally `label`.

    The test split is the set's `test`, or else its `validation`. With image_size, images are
    centre-cropped to squares and resized; without, they must have one size. The folder is TFDS's
    own, ~/tensorflow_datasets or the environment variable TFDS_DATA_DIR.

    Raises:
      UserError: the set is unknown, isn't prepared as array_record, or doesn't fit this description;
        on reading, a label is outside the classes (TFDS stores -1 in a split without labels).
    """
    # Imported here, because it takes seconds and only this source needs it.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, file_format="array_record")
    except (ValueError, AssertionError) as error:  # unknown name, config or format; unknown version
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"tfds:{name} can't be opened ({reason}): check its name, and that it is prepared as "
            f"array_record"
        ) from error
    chosen = _choose_split(name, split=split, available=list(builder.info.splits))
    try:
        records = builder.as_data_source(chosen)
    except NotImplementedError as error:
        raise _not_prepared(name) from error

    features = builder.info.features
    if "image" not in features:
        raise UserError(
            f"tfds:{name} has no feature `image`, only {sorted(features)}: choose a set of images"
        )
    shape = features["image"].shape
    if features["image"].np_dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3):
        raise UserError(
            f"tfds:{name} has {features['image'].np_dtype} images of shape {shape}: choose a set of "
            f"uint8 images with 1 or 3 channels"
        )
    height, width, channels = shape
    if image_size is not None:
        height = width = image_size
    if height is None or width is None:
        raise UserError(f"images of tfds:{name} differ in size: set data.image_size to resize them")
    class_names = ["all"]
    if "label" in features:
        if not isinstance(features["label"], tfds.features.ClassLabel):
            raise UserError(
                f"tfds:{name} has the label {features['label']}: choose a set with class labels"
            )
        class_names = features["label"].names

    def read(indices: np.ndarray) -> Examples:
        examples = [records[int(i)] for i in indices]
        pixels = np.stack([_fit(example["image"], (height, width)) for example in examples])
        labels = np.array([example.get("label", 0) for example in examples], np.int32)
        unknown = labels[(labels < 0) | (labels >= len(class_names))]
        if len(unknown):
            raise UserError(
                f"tfds:{name} has the label {unknown[0]} in its {chosen} split, but only "
                f"{len(class_names)} classes: choose a set whose splits are labelled"
            )
        return {"image": from_uint8(pixels), "label": labels}

    return Source(
        name=f"tfds:{name}",
        split=split,
        shape=(height, width, channels),
        size=len(records),
        class_names=tuple(class_names),
        read=read,
    )


def _choose_split(name: str, *, split: str, available: list[str]) -> str:
    if not available:
        raise _not_prepared(name)
    for candidate in ("test", "validation") if split == "test" else ("train",):
        if candidate in available:
            return candidate
    raise UserError(f"tfds:{name} has no {split} split, only {available}: choose a set with one")


def _fit(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.shape[:2] == size:
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return np.asarray(crop_and_resize(image, size[0])).reshape(*size, pixels.shape[-1])


def _not_prepared(name: str) -> UserError:
    return UserError(
        f'tfds:{name} is not prepared on disk: run `python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\"` once, which "
        "needs TensorFlow"
    )
