"""Archives of public packages: fetched once, checked against a pinned digest, read with care."""

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
"""Bytes that a member of an archive may have."""

_BLOCK = 1 << 20
_TIMEOUT = 60.0


@dataclass(frozen=True)
class NpmPackage:
    """A package at one version; `sha512` (hexadecimal) and `size` (bytes) are its tarball's."""

    name: str
    version: str
    sha512: str
    size: int

    @property
    def file_name(self) -> str:
        """What the tarball is called, as `npm pack` calls it."""
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}.tgz"

    @property
    def url(self) -> str:
        """Where the registry has the tarball: that of npm's own variable, or of npm's settings."""
        registry = os.environ.get(REGISTRY_VARIABLE) or _registry_of_npm()
        base = self.name.rpartition("/")[2]
        return f"{registry.rstrip('/')}/{self.name}/-/{base}-{self.version}.tgz"


def fetch(package: NpmPackage, cache: epath.Path) -> epath.Path:
    """The package's tarball in the folder `cache`, downloaded unless it is there and whole.

    Raises:
      UserError: it can't be had, or isn't what was pinned.
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
                f"{url} can't be fetched ({error}): check the network, or put "
                f"{package.file_name}, as `npm pack {package.name}@{package.version}` makes it, into "
                f"{cache}"
            ) from error
        if file_digest(part, "sha512") != package.sha512:
            raise UserError(
                f"{url} is not the file that was pinned, its SHA-512 differs: check "
                f"{REGISTRY_VARIABLE}, or what lies between you and the registry"
            )
    return target


def _registry_of_npm() -> str:
    """Raises UserError if npm isn't there to be asked."""
    try:
        asked = subprocess.run(
            ["npm", "config", "get", "registry"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"no npm is installed that would know its registry: install it, or set "
            f"{REGISTRY_VARIABLE} to a registry's address"
        ) from error
    return asked.stdout.strip()


def read_members(
    archive: epath.Path, wanted: Callable[[str], bool], *, max_size: int = MAX_MEMBER
) -> dict[str, bytes]:
    """The regular files of a .tgz whose names are `wanted`, by name; nothing is written to disk.

    Raises:
      UserError: it isn't such an archive, or a wanted file is larger than max_size bytes.
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
                        f"{max_size}: remove the archive, and it is fetched again"
                    )
                stream: Any = members.extractfile(member)
                found[member.name] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(
            f"{archive} can't be read: {error}; remove it, and it is fetched again"
        ) from (error)
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
                raise ValueError(f"it is longer than its {size} bytes")
            file.write(block)
            advance(received, "")


def file_digest(path: epath.Path, algorithm: str) -> str:
    """The hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
