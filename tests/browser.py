"""A headless browser for tests of the project's pages, and axe-core's findings on them.

They need the packages playwright and axe-playwright-python, and Chromium: the one that the
environment variable GUIDED_DISTILL_CHROMIUM names, or one on the PATH.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = "GUIDED_DISTILL_CHROMIUM"
_PATIENCE = 240_000
"""Milliseconds; long, because a page may wait for a compile on a busy machine."""

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str:
    """Return the browser's path, or skip the test if there is none."""
    found = os.environ.get(CHROMIUM) or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium on the PATH: name one in {CHROMIUM}")
    return found


@contextlib.contextmanager
def opened_page(**context: Any) -> Iterator[Any]:
    """Open a page in a headless browser, or skip the test without one. context: as for new_context."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    path = chromium()
    with playwright.sync_playwright() as driver:
        # Most containers don't allow Chromium's sandbox, and these pages are our own.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            page = browser.new_context(**context).new_page()
            page.set_default_timeout(_PATIENCE)
            yield page
        finally:
            browser.close()


def serious_findings(page: Any) -> list[str]:
    """axe-core's serious and critical findings on a page as it is now: each rule and where it fails."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe isn't installed")
    return [
        f"{finding['id']}: {node['html']}"
        for finding in axe.Axe().run(page).response["violations"]
        if finding["impact"] in ("serious", "critical")
        for node in finding["nodes"]
    ]
