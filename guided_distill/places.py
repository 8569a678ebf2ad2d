"""The files and folders that flags and configs name: on this machine or in a bucket."""

from importlib.util import find_spec

from etils import epath

from guided_distill.errors import UserError

BUCKETS = "gs://"


def path_named(name: str) -> epath.Path:
    """What a name stands for; a ~ at its start is the home folder.

    Raises UserError for one in a bucket where the client of buckets isn't installed.
    """
    found = epath.Path(name).expanduser()
    if name.startswith(BUCKETS) and not any(map(find_spec, ("gcsfs", "tensorflow"))):
        raise UserError(
            f"{name} is in a bucket, and gcsfs, which reads those, isn't installed: install the "
            f"package's extra `tpu`"
        )
    return found


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
