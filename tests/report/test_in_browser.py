"""Both pages in a browser: from disk, without a network, on a phone's screen, by keyboard."""

import pytest
from browser import opened_page, serious_findings
from etils import epath
from run_folder import WEIGHTS, make_run, rows_of

from guided_distill.report.compare import write_comparison
from guided_distill.report.page import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """The addresses of a run's page and of a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / name, results=rows_of(fd=1.0), skipped=1) for name in ("a", "b")]
    pages = [write_report(runs[0]), write_comparison(runs, epath.Path(folder / "compare.html"))]
    return [f"file://{page}" for page in pages]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_their_screen_and_axe_finds_nothing_serious(addresses, scheme, width):
    screen = {"width": width, "height": 844}
    with opened_page(color_scheme=scheme, viewport=screen, offline=True) as page:
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        for address in addresses:
            page.goto(address)
            sizes = "[document.documentElement.scrollWidth, window.innerWidth]"
            wide, window = page.evaluate(sizes)
            assert wide <= window
            assert serious_findings(page) == []
        assert errors == []


def test_the_slider_goes_by_keyboard_and_says_where_it_is(addresses):
    with opened_page(offline=True) as page:
        for address in addresses:
            page.goto(address)
            knob = page.get_by_label("Guidance weight w")
            knob.focus()
            knob.press("Home")
            for w in WEIGHTS:
                assert knob.get_attribute("aria-valuetext") == f"w = {w:g}"
                shown = page.locator("[data-frame]:visible")
                assert shown.count() == 1
                assert f"samples at w = {w:g}: " in shown.locator("img").first.get_attribute("alt")
                knob.press("ArrowRight")


def test_without_script_every_grid_is_there(addresses):
    with opened_page(java_script_enabled=False) as page:
        for address in addresses:
            page.goto(address)
            assert page.locator("[data-frame]:visible").count() == len(WEIGHTS)
            assert not page.get_by_label("Guidance weight w").is_visible()
            titles = page.locator("[data-frame] h3").all_inner_texts()
            assert titles == [f"w = {w:g}" for w in WEIGHTS]
