"""The verb that checks the machine: doctor."""

import argparse
from typing import Any

from guided_distill.verbs.shared import command


def add_verbs(verbs: Any) -> None:
    """Add this verb to the parser."""
    command(
        verbs,
        "doctor",
        _doctor,
        "report the installed versions and the devices, and try a tiny run of every part",
        "guided-distill doctor",
    )


def _doctor(_: argparse.Namespace, __: list[str]) -> None:
    from guided_distill.doctor import installed, self_test
    from guided_distill.training.progress import console

    console.print(installed(), highlight=False)
    self_test()
    print("all is well")
