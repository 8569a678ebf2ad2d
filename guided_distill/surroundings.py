"""What the program finds around it: variables of a shell or notebook, devices, standard output."""

import importlib.util
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from guided_distill.errors import UserError

# As in stopping.py, nothing here imports what takes long. JAX and matplotlib read their variables when
# they are imported.

_DEVICES = ("accel*", "vfio/[0-9]*", "nvidia*", "kfd", "dxg")
"""In /dev: TPUs of both kinds of drivers, GPUs."""

_GOOGLE = "0x1ae0"
_DISKS_AND_NETWORKS = ("0x01", "0x02")

# JAX and libtpu set these themselves on any machine, and what they start inherits them.
_NO_SIGN_OF_A_TPU = {
    *("TPU_LIBRARY_PATH", "TPU_SKIP_MDS_QUERY"),
    *("TPU_ML_PLATFORM", "TPU_ML_PLATFORM_VERSION"),
}


def settle() -> None:
    """Draw to files, ask for no TPU in vain, and make a sentence of output that can't be written."""
    # Jupyter names a backend for all that it starts, which other environments than its own lack.
    os.environ["MPLBACKEND"] = "agg"
    if in_vain(os.environ):
        os.environ["JAX_PLATFORMS"] = "cpu"
    sys.stdout = _checked(sys.stdout, must_be_written=True)
    sys.stderr = _checked(sys.stderr, must_be_written=False)


def in_vain(environ: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether JAX would ask libtpu for a TPU that isn't there, which takes time and lines of errors.

    False as well for a user who chose JAX's platforms, and where there may be another accelerator.
    """
    if "JAX_PLATFORMS" in environ or not _installed("libtpu") or _installed("jax_plugins"):
        return False
    named = {name for name in environ if name.startswith("TPU_") or name == "JAX_FORCE_TPU_INIT"}
    devices = [each for pattern in _DEVICES for each in (root / "dev").glob(pattern)]
    return not (named - _NO_SIGN_OF_A_TPU or devices or _google_chips(root))


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _google_chips(root: Path) -> list[Path]:
    """Google's devices on the bus that are no disks or networks of a virtual machine."""
    return [
        device
        for device in (root / "sys/bus/pci/devices").glob("*")
        if (device / "vendor").read_text().strip() == _GOOGLE
        and not (device / "class").read_text().startswith(_DISKS_AND_NETWORKS)
    ]


class _Checked(io.FileIO):
    """A stream whose failure is a sentence, or passed over."""

    must_be_written = False

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            if self.must_be_written:
                raise UserError(
                    f"standard output can't be written ({error}): make room, or send it elsewhere"
                ) from error
            return len(data)


def _checked(stream: TextIO | None, *, must_be_written: bool) -> Any:
    if not isinstance(stream, io.TextIOWrapper):  # It was closed.
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
