"""The command line: guided-distill and a verb."""

import argparse
import atexit
import functools
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from guided_distill import stopping, surroundings
from guided_distill.errors import Interrupted, UserError

DESCRIPTION = "Distill classifier-free guided diffusion models to a few sampling steps."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Return its exit status: 0, 2 for bad input, 75 or 130 if the same command resumes."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    _hush()
    try:
        verbs = parser()
        options, rest = verbs.parse_known_args(sys.argv[1:] if argv is None else argv)
        unknown = [each for each in rest if not each.startswith("--config.")]
        if unknown or (rest and options.verb not in ("plan", "train", "sweep", "config")):
            verbs.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
        options.run(options, rest)
    except UserError as error:
        print(f"guided-distill: {_one_line(error)}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"guided-distill: {_one_line(error)}", file=sys.stderr)
        return Interrupted.STATUS
    except KeyboardInterrupt as error:
        print(f"guided-distill: {error if error.args else stopping.STOPPED}", file=sys.stderr)
        return stopping.STATUSES[signal.SIGINT]
    return 0


def _one_line(error: BaseException) -> str:
    """The error's message on one line, even if a name or value in it contains a line break."""
    return " ".join(str(error).split())


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main` and exit at once: threads that libraries leave behind can abort Python as it exits."""
    stopping.watch()
    surroundings.prepare()
    try:
        status = main(argv)
    except SystemExit as ending:  # Raised by argparse.
        status = int(ending.code or 0)
    stopping.finish(status)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except UserError as error:
        # If this error ended the verb, it has been reported already.
        if status == 0:
            print(f"guided-distill: {error}", file=sys.stderr)
        status = status or 2
    sys.stderr.flush()
    os._exit(status)


@functools.cache
def _hush() -> None:
    """Keep libraries from printing messages that mean nothing to the user.

    Background threads pass their errors to the main thread anyway: when a save fails, Orbax also logs
    each traceback, and TensorStore's threads, which have no Python object to name, report that the event
    loop they would return to is closed. With JAX 0.7, Grain warns that its worker processes can't be
    profiled, but this program starts none.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(
            lambda record: not record.exc_info and "worker profiling" not in str(record.msg)
        )
    report = sys.unraisablehook
    sys.unraisablehook = lambda error: None if error.object is None else report(error)


def parser() -> argparse.ArgumentParser:
    """The parser of every verb. For a shell's completion, the process ends here."""
    # Imported here because a signal can arrive before everything is imported.
    from importlib.metadata import version

    from guided_distill.verbs import (
        completion,
        configs,
        data,
        images,
        machine,
        models,
        pages,
        runs,
        studies,
    )
    from guided_distill.verbs.shared import Parser

    parser = Parser("guided-distill", description=DESCRIPTION)
    parser.add_argument(
        "--version", action="version", version=f"guided-distill {version('guided_distill')}"
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for room in (runs, configs, studies, images, pages, models, data, machine, completion):
        room.add_verbs(verbs)
    completion.complete(parser)
    return parser


if __name__ == "__main__":
    run()
