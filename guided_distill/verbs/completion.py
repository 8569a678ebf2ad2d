"""The verb completion, and what a shell completes: verbs, flags, config files, stages of a run."""

import argparse
import importlib.util
import os
from typing import Any

from etils import epath

from guided_distill.errors import UserError
from guided_distill.verbs.shared import command

VARIABLE = "_ARGCOMPLETE"
"""The environment variable with which a shell's script asks this program for completions."""

_STAGES = ("stage", "stages", "encoder", "decoder")


def add_verbs(verbs: Any) -> None:
    """Add this verb to the parser."""
    completion = command(
        verbs,
        "completion",
        _completion,
        "print a script that makes a shell complete this program's command lines",
        "guided-distill completion bash",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")


def _completion(options: argparse.Namespace, _: list[str]) -> None:
    if importlib.util.find_spec("argcomplete") is None:
        raise UserError(
            "completion needs argcomplete, which isn't installed: pip install argcomplete (the extra "
            "`completion`)"
        )
    import argcomplete

    print(argcomplete.shellcode(["guided-distill"], shell=options.shell))


def complete(parser: argparse.ArgumentParser) -> None:
    """If a shell started this process for its completions, write them and end the process."""
    if VARIABLE not in os.environ:
        return
    import argcomplete

    _set_completers(parser, argcomplete.FilesCompleter(allowednames=("py",)))
    argcomplete.autocomplete(parser)


def _set_completers(parser: argparse.ArgumentParser, config_files: Any) -> None:
    """Set what completes the values of flags; argcomplete's default are the names of files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                _set_completers(each, config_files)
        elif action.dest in _STAGES:
            action.completer = _stages  # type: ignore[attr-defined]
        elif action.dest == "config":
            action.completer = config_files  # type: ignore[attr-defined]


def _stages(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """The stages in the workdir that is already given, after those before a comma."""
    workdir = getattr(parsed_args, "workdir", None)
    if not isinstance(workdir, epath.Path) or not workdir.is_dir():
        return []
    before = prefix.rpartition(",")[0]
    names = sorted(each.parent.name for each in workdir.glob("*/checkpoints"))
    return [f"{before},{name}" if before else name for name in names]
