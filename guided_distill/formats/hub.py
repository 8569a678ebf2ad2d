"""Repositories of a hub, huggingface.co or another by HF_ENDPOINT: download a model, upload an export."""

import importlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from guided_distill.errors import UserError
from guided_distill.formats.diffusers_folder import (
    CLASS_EMBEDDER,
    DENOISERS,
    MODEL_INDEX,
    weights_files,
)
from guided_distill.runs.trained import package_version

HUB = "hub:"

_WITH_WEIGHTS = (*DENOISERS, "vae", "text_encoder", CLASS_EMBEDDER)

# The files to download; a hub's repository often holds the same weights several times.
_FILES = (
    MODEL_INDEX,
    *(
        f"{part}/*.{ending}"
        for part in (*_WITH_WEIGHTS, "scheduler", "tokenizer")
        for ending in ("json", "txt", "safetensors")
    ),
)
_HALVES = ("*fp16*", "*bf16*")
_COPIES = (*_HALVES, "*non_ema*", "*openvino*", "*flax*")


def hub_client(flag: str) -> Any:
    """The package huggingface_hub. Raises UserError, naming the flag, if it isn't installed."""
    # What its warnings mean for the user is in the errors that follow them.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UserError(
            f"{flag} needs the package huggingface_hub: pip install it (the extra `hub`), or use a "
            f"folder on this machine"
        ) from None


def download(name: str) -> epath.Path:
    """The diffusers folder of a repository, ID or ID@REVISION, unless the hub's cache has it already.

    The folder's name is the commit's hash. Raises UserError if the download fails, or the repository
    holds no such folder.
    """
    hub = hub_client(f"--from {HUB}{name}")
    repository, _, revision = name.partition("@")

    def fetch(revision: str | None, patterns: Sequence[str], copies: Sequence[str]) -> epath.Path:
        return epath.Path(
            hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(copies),
            )
        )

    try:
        folder = fetch(revision or None, _FILES, _COPIES)
        parts = [part for part in _WITH_WEIGHTS if (folder / part).is_dir()]
        lacking = [part for part in parts if not weights_files(folder / part)]
        if lacking:
            halves = [f"{part}/{half}" for part in lacking for half in _HALVES]
            fetch(folder.name, halves, ("*.bin", "*.msgpack", *_COPIES[len(_HALVES) :]))
    except Exception as error:  # The hub's client raises errors of many classes.
        raise UserError(
            f"--from {HUB}{name} can't be downloaded ({_words(error)}): check the name and the network"
        ) from error
    if not (folder / MODEL_INDEX).exists():
        raise UserError(
            f"--from {HUB}{name} is not a diffusers model ({MODEL_INDEX} is missing): give a repository "
            f"that holds one"
        )
    return folder


def check_repository(repository: str) -> None:
    """Raises UserError unless the name is USER/NAME and huggingface_hub is installed."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository, re.ASCII):
        raise UserError(f"--push is {repository!r}; give USER/NAME, such as me/digits")
    hub_client(f"--push {repository}")


def files_to_upload(folder: epath.Path) -> Iterator[tuple[str, int]]:
    """The name and the size in bytes of each file in a folder of this machine, by name."""
    # epath's stat looks up the owner's name and fails if the owner has none.
    for path in sorted(each for each in Path(folder).rglob("*") if each.is_file()):
        yield path.relative_to(folder).as_posix(), path.stat().st_size


def upload(folder: epath.Path, repository: str, *, public: bool) -> str:
    """Upload a folder to a repository, which is made if it doesn't exist, and return its address.

    public: whether a new repository is public; an existing one stays as it is. Raises UserError if there
    is no token, or the upload fails.
    """
    hub = hub_client(f"--push {repository}")
    if hub.get_token() is None:
        raise UserError(
            f"nothing was uploaded to {repository}, because there is no token: log in with `hf auth "
            f"login`, or set HF_TOKEN"
        )
    try:
        api = hub.HfApi(library_name="guided_distill", library_version=package_version())
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            commit_message=f"Upload with guided_distill {package_version()}",
        )
    except Exception as error:  # As above.
        raise UserError(
            f"--push {repository} can't be uploaded ({_words(error)}): check the name, the token's "
            f"permissions and the network"
        ) from error
    return str(address)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
