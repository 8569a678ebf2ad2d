"""What the verbs of the command line share: flags, and parsers of their values."""

import argparse
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from etils import epath

from guided_distill import kinds
from guided_distill.errors import UserError
from guided_distill.places import cache_folder, path_named

Value = TypeVar("Value")

RUN_OR_FILE = "the run's folder, or a model's .safetensors file"
"""The help of --workdir for verbs that need only one model."""


def command(
    verbs: Any, name: str, run: Callable[..., None], words: str, example: str
) -> argparse.ArgumentParser:
    """Add a verb without its flags; `run` is called with the options and the config overrides."""
    verb = verbs.add_parser(name, help=words, description=words, epilog=f"example: {example}")
    verb.set_defaults(run=run)
    return verb


def command_of_run(
    verbs: Any,
    name: str,
    run: Callable[..., None],
    words: str,
    example: str,
    *,
    what: str = "the run's folder",
) -> argparse.ArgumentParser:
    """Add a verb with the flag --workdir, whose help is `what`; otherwise like `command`."""
    verb = command(verbs, name, run, words, example)
    verb.add_argument("--workdir", required=True, type=path, help=what)
    return verb


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in a flag like any other bad input."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        own = re.match(r"argument (?:-\w, )?(--\w+|[A-Z]+): (is .*)", message, re.DOTALL)
        raise UserError(" ".join(own.groups()) if own else f"{message}; see {self.prog} --help")


def path(text: str) -> epath.Path:
    """Parse the name of a file or folder. An empty name is an error, not the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder (. is the current one)")
    try:
        return path_named(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(f"{text} ")) from error


def stage_folder(text: str) -> str:
    """Parse the name of a stage's folder within its run."""
    if text in ("", ".", "..") or set(text) & {"/", "\\"}:
        raise argparse.ArgumentTypeError(
            f"is {text!r}; give the name of a stage's folder in the run, such as halving_ddim_4"
        )
    return text


def number(kind: Any) -> Callable[[str], Any]:
    """Return a parser of numbers of this kind."""

    def read(text: str) -> Any:
        try:
            return kinds.read_number(text, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


CACHE: dict[str, Any] = {
    "type": path,
    "default": cache_folder(),
    "help": "folder for downloads and compiled programs (default: %(default)s)",
}
"""The flag --cache."""


def keep_compiled_programs(cache: epath.Path) -> None:
    """Let JAX cache compiled programs in the folder, unless JAX's own cache is set already."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))


def add_process_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the flags of every verb that several processes can run together."""
    verb.add_argument(
        "--start_timeout",
        type=number(kinds.Count),
        default=300,
        metavar="SECONDS",
        help="with several processes, how long to wait for all to start (default: %(default)s)",
    )


def check_same_options(options: argparse.Namespace) -> None:
    """Raise UserError in every process unless all processes have the same flags."""
    from guided_distill.training.processes import texts_of_all

    flags = {
        "the verb" if name == "verb" else f"--{name}": _written(value)
        for name, value in vars(options).items()
        if name not in ("run", "cache", "start_timeout")
    }
    first, *others = map(json.loads, texts_of_all(json.dumps(flags)))
    for index, other in enumerate(others, start=1):
        for flag, ours in first.items():
            if other.get(flag) != ours:
                raise UserError(
                    f"{flag} is {other.get(flag)} in process {index} and {ours} in process 0: start all "
                    f"processes with the same command"
                )


def _written(value: Any) -> str:
    """A flag's value as it is written on the command line."""
    if value is None:
        return "not given"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def add_sampling_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the flags of every verb that samples."""
    verb.add_argument(
        "--stage",
        type=stage_folder,
        help="folder of the stage in the workdir (default: the last finished one)",
    )
    verb.add_argument(
        "--w",
        type=number(kinds.Weight),
        help="guidance weight w (default: 1, or the nearest trained w)",
    )
    verb.add_argument(
        "--num_steps", type=number(kinds.NumSteps), help="sampling steps (default: as trained)"
    )
    verb.add_argument("--sampler", help="sampler (default: as trained)")
    verb.add_argument(
        "--seed", type=number(kinds.Seed), default=0, help="seed (default: %(default)s)"
    )
    verb.add_argument("--out", type=path, help="folder to write to (default: WORKDIR/samples)")
    verb.add_argument(
        "--allow_untrained",
        action="store_true",
        help="allow a w, num_steps or sampler that the student wasn't trained for",
    )


def label(text: str) -> int | str:
    """Parse a class: its number, or else its name."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text


def several(read: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    """Return a parser of values separated by commas."""
    return lambda text: tuple(read(part.strip()) for part in text.split(","))
