"""What the verbs of the command line have in common."""

import argparse
import json
from collections.abc import Callable
from typing import Any, TypeVar

from etils import epath

from guided_distill.errors import UserError

Value = TypeVar("Value")

CACHE: dict[str, Any] = {
    "type": epath.Path,
    "default": epath.Path("~/.cache/guided_distill").expanduser(),
    "help": "folder that keeps what took long to get (default: %(default)s)",
}
"""The flag --cache."""


def command(
    verbs: Any, name: str, run: Callable[..., None], words: str, example: str
) -> argparse.ArgumentParser:
    """Adds a verb whose arguments are still to come; `run` gets the options and config overrides."""
    verb = verbs.add_parser(name, help=words, description=words, epilog=f"example: {example}")
    verb.set_defaults(run=run)
    return verb


def command_of_run(
    verbs: Any, name: str, run: Callable[..., None], words: str, example: str
) -> argparse.ArgumentParser:
    """As `command`, for a verb that works on a run's folder."""
    verb = command(verbs, name, run, words, example)
    verb.add_argument("--workdir", required=True, type=workdir, help="the run's folder")
    return verb


def workdir(text: str) -> epath.Path:
    """The folder that --workdir or --out names, which isn't the current one by mistake."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a folder, or . for the current one")
    return epath.Path(text)


def keep_compiled_programs(cache: epath.Path) -> None:
    """Let JAX look up in the folder what it compiled before, unless it was told of another."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))


def add_process_arguments(verb: argparse.ArgumentParser) -> None:
    """Those of every verb that many processes can run together."""
    verb.add_argument(
        "--start_timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="of many processes: how long to wait for the others to start (default: %(default)s)",
    )


def check_same_options(options: argparse.Namespace) -> None:
    """Raises UserError, in every process, unless all that run together were given the same flags."""
    from guided_distill.training.processes import texts_of_all

    flags = {
        "the verb" if name == "verb" else f"--{name}": "not given" if value is None else str(value)
        for name, value in vars(options).items()
        if name not in ("run", "cache", "start_timeout")
    }
    first, *others = map(json.loads, texts_of_all(json.dumps(flags)))
    for index, other in enumerate(others, start=1):
        for flag, ours in first.items():
            if other.get(flag) != ours:
                raise UserError(
                    f"{flag} is {other.get(flag)} in process {index} and {ours} in process 0: start all "
                    f"processes by the same command"
                )


def add_sampling_arguments(verb: argparse.ArgumentParser) -> None:
    """Those of every verb that samples."""
    verb.add_argument(
        "--stage",
        help="folder of the stage in the workdir (default: the last one that is finished)",
    )
    verb.add_argument(
        "--w", type=float, help="guidance weight (default: 1, or the nearest that was trained)"
    )
    verb.add_argument("--num_steps", type=int, help="sampling steps (default: as trained)")
    verb.add_argument("--sampler", help="sampler (default: as trained)")
    verb.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    verb.add_argument("--out", type=workdir, help="folder to write to (default: WORKDIR/samples)")
    verb.add_argument(
        "--allow_untrained",
        action="store_true",
        help="allow a w, num_steps or sampler that the student wasn't trained for",
    )


def label(text: str) -> int | str:
    """What names a class on the command line: a number, or else a name."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text


def parse_list(
    flag: str, text: str | None, kind: Callable[[str], Value]
) -> tuple[Value, ...] | None:
    """The values of a flag that are separated by commas. Raises UserError, naming the flag."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        example = "0.5,1,2" if kind is float else "0,3,7"
        raise UserError(f"{flag} is {text!r}; give numbers like {example}") from None
