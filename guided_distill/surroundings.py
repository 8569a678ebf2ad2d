"""Preparation of the process for its environment: variables, accelerators, standard output."""

import importlib.util
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from guided_distill.errors import UserError

# As in stopping.py, nothing here imports a slow module. JAX and matplotlib read their variables when they
# are imported.

_DEVICES = ("accel*", "vfio/[0-9]*", "nvidia*", "kfd", "dxg")
"""Names in /dev of TPUs, with either kind of driver, and of GPUs."""

_GOOGLE = "0x1ae0"
_DISKS_AND_NETWORKS = ("0x01", "0x02")

# JAX and libtpu set these themselves on any machine, and child processes inherit them.
_NO_SIGN_OF_A_TPU = {
    *("TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY"),
    *("TPU_ML_PLATFORM", "TPU_ML_PLATFORM_VERSION"),
}


def prepare() -> None:
    """Make matplotlib draw to files, skip the search for a missing TPU, and report unwritable output.

    If standard output can't be written, the program raises UserError; failures of standard error are
    ignored.
    """
    # Jupyter sets a backend for all processes that it starts, which may be missing in their environment.
    os.environ["MPLBACKEND"] = "agg"
    if lacks_tpu(os.environ):
        os.environ["JAX_PLATFORMS"] = "cpu"
    sys.stdout = _checked(sys.stdout, must_be_written=True)
    sys.stderr = _checked(sys.stderr, must_be_written=False)


def lacks_tpu(environ: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether libtpu is installed without a TPU, so that JAX's search would take time and print errors.

    False if the user chose JAX's platforms, or if there may be another accelerator.
    """
    if "JAX_PLATFORMS" in environ or not _installed("libtpu") or _installed("jax_plugins"):
        return False
    named = {name for name in environ if name.startswith("TPU_") or name == "JAX_FORCE_TPU_INIT"}
    devices = [each for pattern in _DEVICES for each in (root / "dev").glob(pattern)]
    return not (named - _NO_SIGN_OF_A_TPU or devices or _google_chips(root))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _google_chips(root: Path) -> list[Path]:
    """Return Google's PCI devices other than the disks and networks of a virtual machine."""
    return [
        device
        for device in (root / "sys/bus/pci/devices").glob("*")
        if (device / "vendor").read_text().strip() == _GOOGLE
        and not (device / "class").read_text().startswith(_DISKS_AND_NETWORKS)
    ]


class _Checked(io.FileIO):
    """A stream that raises UserError if a write fails, or ignores the failure."""

    must_be_written = False

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            if self.must_be_written:
                raise UserError(
                    f"standard output can't be written ({error}): make room, or redirect it elsewhere"
                ) from error
            return len(data)


def _checked(stream: TextIO | None, *, must_be_written: bool) -> Any:
    if not isinstance(stream, io.TextIOWrapper):  # The stream was closed.
        return open(os.devnull, "w")
    raw = _Checked(stream.fileno(), "w", closefd=False)
    raw.must_be_written = must_be_written
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
