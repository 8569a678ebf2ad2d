"""The verbs that make data: prepare and encode."""

import argparse
from typing import Any

from guided_distill import kinds
from guided_distill.verbs.shared import CACHE, command, number, path


def add_verbs(verbs: Any) -> None:
    """Add these verbs to the parser."""
    _add_prepare(verbs)
    _add_encode(verbs)


def _add_prepare(verbs: Any) -> None:
    words = "download a public package once and make a data set or a text encoder from it"
    prepare = verbs.add_parser("prepare", help=words, description=words)
    things = prepare.add_subparsers(dest="thing", required=True, metavar="thing")
    emoji = command(
        things,
        "emoji",
        _prepare_emoji,
        "captioned drawings in three styles, for data.name=npz:FILE",
        "guided-distill prepare emoji --out data/emoji3.npz",
    )
    emoji.add_argument("--out", required=True, type=path, help=".npz file to write")
    emoji.add_argument(
        "--image_size",
        type=number(kinds.Width),
        default=64,
        help="side in pixels (default: %(default)s)",
    )
    emoji.add_argument(
        "--skin_tones",
        action="store_true",
        help="keep the variants of people with different skin tones",
    )
    emoji.add_argument("--cache", **CACHE)
    minilm = command(
        things,
        "minilm",
        _prepare_minilm,
        "the text encoder all-MiniLM-L6-v2, for flags and keys that take minilm:DIR",
        "guided-distill prepare minilm --out data/minilm",
    )
    minilm.add_argument("--out", required=True, type=path, help="folder to write to")
    minilm.add_argument("--cache", **CACHE)
    fashion = command(
        things,
        "fashion_mnist",
        _prepare_fashion_mnist,
        "Fashion-MNIST, for configs/fashion_mnist.py, from Debian's package dataset-fashion-mnist",
        "guided-distill prepare fashion_mnist --out data",
    )
    fashion.add_argument("--out", required=True, type=path, help="folder to write to")
    fashion.add_argument(
        "--from",
        dest="source",
        type=path,
        help="folder of the package's four files (default: where the package installs them)",
    )


def _add_encode(verbs: Any) -> None:
    encode = command(
        verbs,
        "encode",
        _encode,
        "compute latents and encoded captions once, for data.name=encoded:OUT; run again to resume",
        "guided-distill encode --data npz:data/emoji3.npz --autoencoder runs/emoji/companions/vae "
        "--text_encoder minilm:data/minilm --out data/emoji3_encoded",
    )
    encode.add_argument("--data", required=True, help="a data source, as in data.name")
    encode.add_argument(
        "--image_size", type=number(kinds.Width), help="side in pixels, as in data.image_size"
    )
    encode.add_argument(
        "--autoencoder", required=True, type=path, help="folder of a diffusers autoencoder"
    )
    encode.add_argument(
        "--text_encoder",
        help="minilm:DIR, clip:DIR or companions:DIR, for captions (default: labels are kept)",
    )
    encode.add_argument(
        "--flip", action="store_true", help="also encode the mirror image of every training image"
    )
    encode.add_argument(
        "--inpaint",
        action="store_true",
        help="also encode every image with a random region masked out, to train in-painting models",
    )
    encode.add_argument(
        "--batch_size",
        type=number(kinds.BatchSize),
        default=32,
        help="images per batch (default: %(default)s)",
    )
    encode.add_argument(
        "--shard_size",
        type=number(kinds.Count),
        default=4096,
        help="examples per file (default: %(default)s)",
    )
    encode.add_argument("--out", required=True, type=path, help="folder to write to")


# As in verbs/runs.py, each verb imports what it needs when it runs.


def _prepare_emoji(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.prepare.emoji import prepare_emoji

    fields = prepare_emoji(
        options.out,
        image_size=options.image_size,
        cache=options.cache,
        skin_tones=options.skin_tones,
    )
    for style, licence in enumerate(fields["licence"]):
        print(f"{(fields['style'] == style).sum()} images. {licence}")
    print(options.out)


def _prepare_minilm(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.prepare.minilm import prepare_minilm

    prepare_minilm(options.out, options.cache)
    print(options.out)


def _prepare_fashion_mnist(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.prepare.fashion_mnist import FOLDER, prepare_fashion_mnist

    for written in prepare_fashion_mnist(options.out, options.source or FOLDER):
        print(written)


def _encode(options: argparse.Namespace, _: list[str]) -> None:
    from guided_distill.data.encode import EncodeRequest, encode_data

    request = EncodeRequest(
        data=options.data,
        image_size=options.image_size,
        text_encoder=options.text_encoder,
        mirrored=options.flip,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        inpaint=options.inpaint,
    )
    encode_data(options.out, request, autoencoder=options.autoencoder)
    print(options.out)
