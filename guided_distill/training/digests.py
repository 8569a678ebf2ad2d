"""Digests of a checkpoint's files, which show whether the files are damaged.

`digests.json` beside a checkpoint's items holds the SHA-256 of each of their files, and one of all these.
Orbax and TensorStore detect some damage but not all, and can't distinguish it from an unavailable disk;
nothing else checks the small files.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from etils import epath

FILE = "digests.json"

_THREADS = 16


def write_digests(folder: epath.Path) -> None:
    """Write `digests.json` to the folder of a checkpoint whose items are complete."""
    # Only the items, because Orbax still writes to the files beside them.
    items = [each for each in folder.iterdir() if each.is_dir()]
    paths = [path.relative_to(folder).as_posix() for item in items for path in _files(item)]
    digests = _digests(folder, sorted(paths))
    text = json.dumps({"files": digests, "all": _digest_of_all(digests)}, indent=1)
    (folder / FILE).write_text(text)


def find_damage(folder: epath.Path, items: Iterable[Iterable[str]]) -> str:
    """Return a description of the damage to a checkpoint's files, "" if there is none or no digests.

    items: for each item, its name and alternatives; the first one that the checkpoint has is checked.
    Raises what the storage raises if a file exists but can't be read.
    """
    try:
        text = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return ""
    try:
        written = json.loads(text)
        expected, total = written["files"], written["all"]
        is_whole = total == _digest_of_all(expected)
    except (ValueError, TypeError, KeyError, AttributeError):
        is_whole = False
    if not is_whole:
        return f"{FILE} is not as it was written"
    there = {path.partition("/")[0] for path in expected}
    checked = {next((name for name in names if name in there), None) for names in items}
    paths = [path for path in expected if path.partition("/")[0] in checked]
    found = _digests(folder, paths)
    for path in paths:
        if found[path] is None:
            return f"{path} is missing"
        if found[path] != expected[path]:
            return f"{path} is not as it was written"
    return ""


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _files(each)
        else:
            yield each


def _digests(folder: epath.Path, paths: list[str]) -> dict[str, str | None]:
    """Return the digest of each file, None for a missing one."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda path: _digest(folder / path), paths)
        return dict(zip(paths, found, strict=True))


def _digest(path: epath.Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except FileNotFoundError:
        return None


def _digest_of_all(digests: Mapping[str, str | None]) -> str:
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
