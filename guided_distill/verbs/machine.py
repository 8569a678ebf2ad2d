"""The verb that checks the machine: doctor."""

import argparse
from typing import Any

from guided_distill.verbs.shared import command


def add_verbs(verbs: Any) -> None:
    """Adds it to the parser's verbs."""
    command(
        verbs,
        "doctor",
        _doctor,
        "report what is installed and which devices are present, and try a tiny run of everything",
        "guided-distill doctor",
    )


def _doctor(_: argparse.Namespace, __: list[str]) -> None:
    from guided_distill.doctor import check_yourself, installed
    from guided_distill.training.progress import console

    console.print(installed(), highlight=False)
    check_yourself()
    print("all is well")
