"""The report in headless Chromium: plots are drawn, at both widths and in both schemes, and nothing is asked of anybody.

Skipped where there is no Chromium, but not in CI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from abliterate.report import draw
from abliterate.report.page import write_report
from support.browser import Browser, browser, chromium
from support.reports import HOSTILE, PICTURES, PLOTS, made_run

pytestmark = pytest.mark.skipif(chromium() is None and "CI" not in os.environ, reason="needs Chromium")
DRAWN = "document.documentElement.dataset.drawn !== undefined"
POINTS = "document.querySelectorAll('#plot-{} .mark-symbol.role-mark path').length"


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = made_run(tmp_path_factory.mktemp("report") / "run", HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "_drawn", PICTURES.drawn)
        write_report(run)
    return run.report


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_plots_are_drawn_and_nothing_is_fetched(tab: Browser, page: Path, width: int, dark: bool) -> None:
    tab.open(page, width=width, dark=dark)
    tab.wait(DRAWN)
    assert set(tab.evaluate("document.documentElement.dataset.drawn").split()) == PLOTS
    assert tab.evaluate("document.querySelectorAll('.live svg').length") == len(PLOTS)
    assert tab.evaluate("document.querySelectorAll('.still').length") == 0
    assert tab.evaluate(POINTS.format("front")) == 41  # forty scored trials and the base model
    assert tab.evaluate(POINTS.format("projection")) == 4  # one of each set has no place
    assert tab.evaluate(POINTS.format("kernels")) == 20
    assert tab.evaluate("document.querySelectorAll('#plot-importance .mark-rect.role-mark path').length") > 8
    assert [address for address in tab.requests if not address.startswith("data:")] == [page.as_uri()]
    assert tab.errors == []
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
    widths = tab.evaluate("[...document.querySelectorAll('.live svg')].map((one) => one.getBoundingClientRect().width)")
    assert all(0.7 * width - 320 < one <= width for one in widths)
    paper, ink = (
        [int(part) for part in tab.evaluate(f"getComputedStyle({of}).{what}").split("(")[1].strip(")").split(",")[:3]]
        for of, what in (("document.body", "backgroundColor"), ("document.querySelector('.role-axis-label text')", "fill"))
    )
    assert (sum(paper) < sum(ink)) == dark
    assert abs(sum(paper) - sum(ink)) > 450


def test_the_slider_is_moved_by_keys(tab: Browser, page: Path) -> None:
    tab.open(page)
    tab.wait(DRAWN)
    tab.evaluate("document.getElementById('layer').focus()")
    assert tab.evaluate("document.getElementById('layer-shown').textContent").startswith("after layer 9")
    tab.key("ArrowLeft", 37)
    tab.wait("document.getElementById('layer-shown').textContent.startsWith('after layer 8')")
    tab.key("Home", 36)
    tab.wait("document.getElementById('layer').getAttribute('aria-valuetext').startsWith('at the embedding')")
    tab.wait(POINTS.format("projection") + " === 4")


def test_a_point_says_its_parameters(tab: Browser, page: Path) -> None:
    tab.open(page)
    tab.wait(DRAWN)
    place = tab.evaluate(
        "(() => { const all = document.querySelectorAll('#plot-front .mark-symbol.role-mark path');"
        "all[all.length - 1].scrollIntoView({block: 'center'});"
        "const box = all[all.length - 1].getBoundingClientRect();"
        "return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()"
    )
    for step in (3, 0):
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=place["x"] + step, y=place["y"])
    tab.wait("document.querySelector('#vg-tooltip-element.visible') !== null")
    told = tab.evaluate("document.getElementById('vg-tooltip-element').innerText")
    for part in ("trial", "refusals", "KL", "mean", "kernel 1", "scope"):
        assert part in told
    assert HOSTILE[:20] in told
    assert tab.evaluate("document.querySelectorAll('#vg-tooltip-element img').length") == 0


def test_without_scripts_there_are_pictures_and_tables(tab: Browser, page: Path) -> None:
    tab.open(page, width=390, scripts=False)
    assert tab.evaluate("document.querySelectorAll('.still svg').length") == len(PLOTS)
    assert tab.evaluate("document.querySelector('.slider').checkVisibility()") is False
    assert tab.evaluate("document.querySelectorAll('table').length") > 8
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
