"""A headless browser that looks at the project's pages, and what axe-core says of them.

It needs the packages playwright and axe-playwright-python, and a Chromium: the one that the
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
"""Milliseconds: what a page waits for may have to be compiled first, on a busy machine."""

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str:
    """The browser's path; skips the test where there is none."""
    found = os.environ.get(CHROMIUM) or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium on the PATH: name one in {CHROMIUM}")
    return found


@contextlib.contextmanager
def opened_page(**context: Any) -> Iterator[Any]:
    """A page of a headless browser; `context` as of playwright's new_context. Skips without one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    path = chromium()
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox can't be had in most containers, and these pages are ours.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            page = browser.new_context(**context).new_page()
            page.set_default_timeout(_PATIENCE)
            yield page
        finally:
            browser.close()


def serious_findings(page: Any) -> list[str]:
    """What axe-core finds serious or critical on a page as it is now: rules, and where they break."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe isn't installed")
    return [
        f"{finding['id']}: {node['html']}"
        for finding in axe.Axe().run(page).response["violations"]
        if finding["impact"] in ("serious", "critical")
        for node in finding["nodes"]
    ]
