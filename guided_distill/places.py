"""The files and folders that flags and configs name: on this machine or in a bucket."""

from importlib.util import find_spec

from etils import epath

from guided_distill.errors import UserError

CLIENTS = {"gs": ("gcsfs", "tensorflow"), "s3": ("s3fs",)}
"""Of the buckets that names like gs://NAME stand for: the packages any of which reads them."""


def path_named(name: str) -> epath.Path:
    """What a name stands for; a ~ at its start is the home folder.

    Raises UserError for a name that isn't UTF-8, and for one in a bucket of an unknown kind, or whose
    client isn't installed.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name!r} is not a name in UTF-8: give or make another") from None
    kind, separator, _ = name.partition("://")
    if not separator:
        return epath.Path(name).expanduser()
    if kind not in CLIENTS:
        raise UserError(f"{name} is in no bucket that is known: give gs:// or s3://, or a folder")
    if not any(map(find_spec, CLIENTS[kind])):
        client, *_ = CLIENTS[kind]
        todo = "install the package's extra `tpu`" if kind == "gs" else "install it"
        raise UserError(
            f"{name} is in a bucket, and {client}, which reads those, isn't installed: {todo}"
        )
    return epath.Path(name)


def local_path_named(name: str, what: str) -> epath.Path:
    """As `path_named`, of something that can be read or written on this machine alone.

    what: how an error calls it, in the plural. Raises UserError for a bucket.
    """
    if "://" in name:
        raise UserError(
            f"{name} is in a bucket, and {what} must be on a disk: copy or write them to one, which the "
            f"hosts may share"
        )
    return path_named(name)
