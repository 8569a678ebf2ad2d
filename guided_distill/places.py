"""Paths from flags and configs: on this machine or in a bucket."""

import os
from importlib.util import find_spec

from etils import epath

from guided_distill.errors import UserError

CLIENTS = {"gs": ("gcsfs", "tensorflow"), "s3": ("s3fs",)}
"""The packages that can read each kind of bucket, such as gs://NAME; any one of them suffices."""


def path_named(name: str) -> epath.Path:
    """Return the path of a name; a ~ at its start is the home folder.

    Raises UserError if the name isn't UTF-8 or contains NUL, or is in a bucket of an unknown kind or
    without an installed client.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name!r} is not a name in UTF-8: rename it or give another name"
        ) from None
    if "\0" in name:
        raise UserError(f"{name!r} contains a NUL character: give another name")
    kind, separator, _ = name.partition("://")
    if not separator:
        return epath.Path(name).expanduser()
    if kind not in CLIENTS:
        raise UserError(f"{name} is in an unknown kind of bucket: give gs:// or s3://, or a folder")
    if not any(map(find_spec, CLIENTS[kind])):
        client, *_ = CLIENTS[kind]
        remedy = "install the package's extra `tpu`" if kind == "gs" else "install it"
        raise UserError(
            f"{name} is in a bucket, but {client}, which reads buckets, isn't installed: {remedy}"
        )
    return epath.Path(name)


def local_path_named(name: str, what: str) -> epath.Path:
    """Like `path_named`, for something that can be read or written only on this machine, not in a bucket.

    what: its name in the error's message, in the plural. Raises UserError for a bucket.
    """
    if "://" in name:
        raise UserError(
            f"{name} is in a bucket, and {what} must be on a disk: copy or write them to one, such as a "
            f"network disk that all hosts share"
        )
    return path_named(name)


def cache_folder() -> epath.Path:
    """The folder for what can be downloaded or computed again: guided_distill in the user's cache.

    The user's cache is $XDG_CACHE_HOME, or else ~/.cache.
    """
    return path_named(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "guided_distill"
