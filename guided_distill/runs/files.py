"""The JSON files of a run's folder, read without JAX: its config, and the stages that it trains."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from guided_distill.errors import UserError
from guided_distill.storage import first_line, is_there, write_text

CONFIG = "config.json"
STAGES = "stages.json"


def read_config_values(workdir: epath.Path) -> dict[str, Any]:
    """The config of a run as a dictionary. Raises UserError if it is missing or damaged."""
    if not is_there(workdir / CONFIG):
        raise UserError(
            f"{workdir} holds no run ({CONFIG} is missing): give the --workdir of a "
            f"`guided-distill train`"
        )
    remedy = (
        "remove it, and run `guided-distill train` with the run's --config, which writes it again"
    )
    return _read_object(workdir / CONFIG, remedy)


def write_stages(workdir: epath.Path, updates: Mapping[str, int]) -> None:
    """Record the run's stages in the order of training, each with its number of updates."""
    write_text(workdir / STAGES, json.dumps(dict(updates), indent=2))


def read_stages(workdir: epath.Path) -> dict[str, int] | None:
    """The stages that `write_stages` recorded; None for a run of a version that didn't.

    Raises UserError for a damaged file.
    """
    path = workdir / STAGES
    if not is_there(path):
        return None
    remedy = "remove it, and run the same `guided-distill train` again, which writes it"
    updates = _read_object(path, remedy)
    for name, count in updates.items():
        if type(count) is not int or count < 0:
            raise UserError(f"{path} is damaged ({name} has no number of updates): {remedy}")
    return updates


def _read_object(path: epath.Path, remedy: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): {remedy}") from error
    return values
