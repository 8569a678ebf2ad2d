"""A stage's log in Weights & Biases."""

import importlib.util
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from guided_distill.errors import UserError
from guided_distill.storage import first_line, is_remote, is_there, write_text
from guided_distill.training.job import Project
from guided_distill.training.metrics import Figures, by_tag, rows_until
from guided_distill.training.progress import console

FILE = "wandb.json"
"""The file in a stage's folder that names its run in a project, and the last step that was sent."""

_SECONDS = 30
"""How long to wait for the server when a run begins and when it ends."""

_NO_ANSWER = ("in time", "timed out")
"""Words in messages that mean that the server didn't answer, rather than that it refused the key."""


def sign_in(name: str) -> Project:
    """Return the project, offline if there is no key, if WANDB_MODE says so or if no server answers.

    Raises UserError if the package is missing, the name isn't one of a project, or the key is wrong.
    """
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", name):
        raise UserError(
            f"--wandb is {name!r}; give a project's name of at most 128 characters, without / \\ # ? % :"
        )
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # The latter is a mere folder, as wandb itself makes.
        raise UserError(
            "--wandb needs the package wandb, which isn't installed: pip install wandb (the extra "
            "`wandb`)"
        )
    os.environ.setdefault("WANDB_SILENT", "true")
    # It reports its own failures through the log of this process.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Project(name, mode)
    try:
        return Project(name, "online" if wandb.login(prompt=False, verify=True) else "offline")
    except wandb.errors.AuthenticationError as error:
        reason = first_line(error)
        if any(words in reason for words in _NO_ANSWER):
            _say(f"doesn't answer ({reason}), so each stage's log stays in its folder: {_SEND}")
            return Project(name, "offline")
        raise UserError(
            f"--wandb is {name}, but the key of Weights & Biases is refused ({reason}): correct "
            f"WANDB_API_KEY or run `wandb login`, or set WANDB_MODE=offline"
        ) from error


_SEND = "`wandb sync STAGE/wandb/offline-run-*` sends it later"


def _say(message: str) -> None:
    console.print(f"Weights & Biases {message}", highlight=False, markup=False)


class _Sent(NamedTuple):
    """The run of a stage in a project, and the last step that was sent to it."""

    project: str
    id: str
    step: int


class WeightsAndBiases:
    """Sends the log of a stage to a run of its own in a project; see `metrics.Writer`.

    A resumed stage continues its run, without sending a step twice: a row that the stage computes again
    after a restart is left out. Nothing that fails here ends the training: the first failure is reported,
    and the rest of the log is not sent.
    """

    def __init__(
        self,
        project: Project,
        directory: epath.Path,
        *,
        about: Mapping[str, Any],
        step: int,
    ) -> None:
        """about: the stage's description, as the config of the run. step: at which the stage resumes."""
        self._file = directory / FILE
        self._sent = _read_sent(self._file, project.name)
        self._run: Any = None
        self._attempt(lambda: self._begin(project, directory, about))
        # Rows that the stage logged without this project, or that were lost.
        for logged, metrics, speed in rows_until(directory, step):
            self.write(logged, metrics, speed=speed)

    def _begin(self, project: Project, directory: epath.Path, about: Mapping[str, Any]) -> None:
        import wandb

        def begin(mode: Any) -> Any:
            return wandb.init(
                project=project.name,
                id=self._sent.id,
                resume="allow",
                group=directory.parent.name,
                name=f"{directory.parent.name}/{directory.name}",
                config=dict(about),
                mode=mode,
                # A bucket can't hold the files that it appends to.
                dir=None if is_remote(directory) else str(directory),
                reinit="create_new",
                settings=wandb.Settings(
                    console="off", silent=True, init_timeout=_SECONDS, finish_timeout=_SECONDS
                ),
            )

        try:
            self._run = begin(project.mode)
        except wandb.errors.CommError as error:
            _say(
                f"can't be reached ({first_line(error)}), so the log stays in {directory}: {_SEND}"
            )
            self._run = begin("offline")

    def write(self, step: int, metrics: Figures, *, speed: Figures) -> None:
        """See `metrics.Writer`."""
        if self._run is None or step <= self._sent.step:
            return
        known = {tag: value for tag, value in by_tag(metrics, speed).items() if value is not None}
        self._attempt(lambda: self._run.log(known, step=step, commit=True))
        self._sent = self._sent._replace(step=step)
        write_text(self._file, json.dumps(self._sent._asdict()))

    def close(self) -> None:
        """Wait a while until everything is sent; what isn't stays in the stage's folder."""
        if self._run is not None:
            self._attempt(self._run.finish)

    def _attempt(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # Whatever goes wrong here, the training goes on.
            self._run = None
            _say(
                f"failed ({first_line(error)}), and gets no more of this log; the training continues"
            )


def _read_sent(file: epath.Path, project: str) -> _Sent:
    """Return what the file says about the project; a new run if it is missing, damaged or of another."""
    new = _Sent(project, secrets.token_hex(4), 0)
    try:
        sent = _Sent(**json.loads(file.read_bytes())) if is_there(file) else new
    except (ValueError, TypeError, RecursionError):
        return new
    valid = sent.project == project and type(sent.id) is str and type(sent.step) is int
    return sent if valid else new
