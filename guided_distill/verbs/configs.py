"""The verb of a config: config show."""

import argparse
from typing import Any

from guided_distill.verbs.runs import read_config_file
from guided_distill.verbs.shared import command


def add_verbs(verbs: Any) -> None:
    """Add this verb to the parser."""
    words = "look at a config file"
    config = verbs.add_parser("config", help=words, description=words)
    things = config.add_subparsers(dest="thing", required=True, metavar="thing")
    show = command(
        things,
        "show",
        _show,
        "list every key of a config with its value, its default if it differs, and its meaning",
        "guided-distill config show configs/digits.py --config.teacher.steps=100",
    )
    show.add_argument(
        "config",
        metavar="CONFIG",
        help="a config file, or FILE:VARIANT; --config.KEY=VALUE overrides a key",
    )


# As in verbs/runs.py, each verb imports what it needs when it runs.


def _show(options: argparse.Namespace, overrides: list[str]) -> None:
    from rich.console import Console

    from guided_distill import config
    from guided_distill.report.keys import key_lines, keys_of

    console = Console()
    for key in keys_of(config.parse(read_config_file(options.config, overrides))):
        console.print(key_lines(key))
