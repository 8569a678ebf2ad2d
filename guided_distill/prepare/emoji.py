"""emoji3: captioned drawings in three styles, made from three packages of the npm registry.

Each emoji is drawn in the styles Noto, Twemoji and, with few exceptions, Fluent 3D; its caption is its
Unicode name and the style. The data source `npz:` reads the file that is written.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from guided_distill.data.images import decode_image
from guided_distill.errors import UserError
from guided_distill.prepare.packages import NpmPackage, fetch, read_members
from guided_distill.storage import npz_bytes, write_bytes

MAX_SIDE = 256
"""The side in pixels of the largest drawings; a few are slightly taller than wide."""

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
# The category of five swatches, which show nothing but a skin tone.
_LEFT_OUT = "Component"
_LIST = "package/emoji.json"


@dataclass(frozen=True)
class Style:
    """One style of drawing: its package, the place of the images in the package, and their licence."""

    words: str
    package: NpmPackage
    folder: str
    suffix: str
    licence: str


STYLES = (
    Style(
        words="flat Noto style",
        package=NpmPackage(
            "emoji-datasource-google",
            "16.0.0",
            sha512="6517b17f3b3b315a0b9e6cd998db0ee132a19c0269e43fbe566e8fa54a47fe31"
            "104257a6a7797cf028d9f83a19d9f68cf51e10c5990e3c90a84fc0e53e17d0dc",
            size=74_344_091,
        ),
        folder="package/img/google/64/",
        suffix=".png",
        licence="Noto Emoji, Google: Apache-2.0",
    ),
    Style(
        words="flat Twemoji style",
        package=NpmPackage(
            "emoji-datasource-twitter",
            "16.0.0",
            sha512="ec5fae0ae1c7fbb427adcd793f9b676ef2a483d13ab65ce2e0c9d3dae5b54653"
            "78a4b613cdae9c3ff76cb487d20ccb698c52d6b997b05a0f2305bb8bd9ec842d",
            size=61_683_754,
        ),
        folder="package/img/twitter/64/",
        suffix=".png",
        licence="Twemoji, Twitter and contributors: CC-BY-4.0, give credit wherever you show them",
    ),
    Style(
        words="3D Fluent style",
        package=NpmPackage(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            sha512="5a5ab69554ad4e7afc043a48274a449d328ee0bb83c71a931214ef46d0f50cb4"
            "45d267bba207914232a87a10c75ee549d9069e720979c1106feb4954006de1ee",
            size=15_792_027,
        ),
        folder="package/assets/",
        suffix=".webp",
        licence="Fluent Emoji 3D, Microsoft: MIT by the package's metadata, without a licence file",
    ),
)


class Emoji(NamedTuple):
    """One emoji. code: its code points, joined by "-".

    group: the name without a skin tone, the same for all skin tones of a drawing. skin_tone: whether the
    emoji is a variant with a skin tone.
    """

    code: str
    name: str
    group: str
    category: str
    skin_tone: bool


def prepare_emoji(
    out: epath.Path, *, image_size: int, cache: epath.Path, skin_tones: bool = False
) -> dict[str, np.ndarray]:
    """Writes the data set to `out`, an .npz file, and returns its fields.

    image uint8 [N, image_size, image_size, 3], on white; label [N], the category, named by class_names;
    style [N], named by style_names; name [N], the Unicode name; caption [N], name and style; group [N],
    the name without a skin tone; skin_tone bool [N], whether it is a variant with a skin tone; licence
    [3], of each style.

    Args:
      cache: folder for the packages' tarballs; missing ones are downloaded.
      skin_tones: whether to keep the variants with skin tones.

    Raises:
      UserError: image_size or out is invalid, or a package can't be downloaded or isn't the pinned one.
    """
    if not 8 <= image_size <= MAX_SIDE:
        raise UserError(f"--image_size is {image_size}: give 8 to {MAX_SIDE} pixels")
    if out.suffix != ".npz":
        raise UserError(f"--out is {out}: give the path of an .npz file to write")
    archives = [fetch(style.package, cache) for style in STYLES]
    emojis = [
        emoji
        for emoji in _list_emojis(archives[0])
        if emoji.category != _LEFT_OUT and (skin_tones or not emoji.skin_tone)
    ]
    examples, images, styles = [], [], []
    for index, (style, archive) in enumerate(zip(STYLES, archives, strict=True)):
        for emoji, image in _drawings(style, archive, emojis, image_size):
            examples.append(emoji)
            images.append(image)
            styles.append(index)
    class_names, labels = np.unique([each.category for each in examples], return_inverse=True)
    fields = {
        "image": np.stack(images),
        "label": labels.astype(np.int32),
        "class_names": class_names,
        "style": np.array(styles, np.int32),
        "style_names": np.array([style.words for style in STYLES]),
        "name": np.array([each.name for each in examples]),
        "caption": np.array(
            [f"{each.name}, {STYLES[s].words}" for each, s in zip(examples, styles, strict=True)]
        ),
        "group": np.array([each.group for each in examples]),
        "skin_tone": np.array([each.skin_tone for each in examples]),
        "licence": np.array([style.licence for style in STYLES]),
    }
    _write(out, fields)
    return fields


def _list_emojis(archive: epath.Path) -> Iterator[Emoji]:
    """Yields every emoji in an archive's list, each followed by its variants with skin tones."""
    texts = read_members(archive, lambda name: name == _LIST)
    if _LIST not in texts:
        raise UserError(f"{archive} has no {_LIST}: remove the archive, and run the command again")
    for entry in json.loads(texts[_LIST]):
        name = entry["name"].lower()
        about = {"group": name, "category": entry["category"]}
        yield Emoji(code=entry["unified"].lower(), name=name, skin_tone=False, **about)
        for tones, variant in entry.get("skin_variations", {}).items():
            words = " and ".join(TONES[tone] for tone in tones.split("-"))
            code = variant["unified"].lower()
            yield Emoji(code=code, name=f"{name}, {words}", skin_tone=True, **about)


def _drawings(
    style: Style, archive: epath.Path, emojis: list[Emoji], size: int
) -> Iterator[tuple[Emoji, np.ndarray]]:
    """Yields the emojis that a style has, each with its image [size, size, 3]."""
    wanted = {_plain(emoji.code) for emoji in emojis}

    def code_of(member: str) -> str:
        return _plain(member.removeprefix(style.folder).removesuffix(style.suffix))

    def is_wanted(member: str) -> bool:
        in_folder = member.startswith(style.folder) and member.endswith(style.suffix)
        return in_folder and code_of(member) in wanted

    files: dict[str, bytes] = {}
    for member, content in read_members(archive, is_wanted).items():
        files.setdefault(code_of(member), content)
    for emoji in emojis:
        if (code := _plain(emoji.code)) in files:
            yield emoji, _decode(f"{emoji.name} of {archive}", files[code], size)


def _plain(code: str) -> str:
    """The code points without the variation selector, which some file names leave out."""
    return "-".join(point for point in code.split("-") if point != "fe0f")


def _decode(what: str, file: bytes, size: int) -> np.ndarray:
    """Decodes a drawing to uint8 [size, size, 3], composited over white and centred in a square."""
    drawing = decode_image(file, what=what)
    if max(drawing.size) > 2 * MAX_SIDE:
        raise UserError(
            f"{what} has {drawing.width} x {drawing.height} pixels, more than a drawing should have: "
            f"remove the archive, and run the command again"
        )
    side = max(drawing.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def _write(out: epath.Path, fields: Mapping[str, Any]) -> None:
    write_bytes(out, npz_bytes(**fields))
