"""The report in a real browser: what is clicked does what it says, and it fits a telephone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lightning_aux.cli import main
from tests.report.browser import CHROMIUM, chromium
from tests.report.folders import comparison_folder, run_folder

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {
        "comparison": comparison_folder(tmp_path_factory.mktemp("comparison")),
        "run": run_folder(tmp_path_factory.mktemp("runs") / "run"),
    }
    for folder in folders.values():
        main(["report", str(folder)])
    return {name: (folder / "report.html").as_uri() for name, folder in folders.items()}


def opened(browser: Any, address: str, width: int = 1200, scheme: str = "light") -> Any:
    """The page, which fails the test where it logs an error or asks for another file."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.heard = []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    page.on("request", lambda request: page.heard.append(request.url))
    page.goto(address)
    assert page.heard == [address]
    return page


def displayed(page: Any, group: str) -> set[bool]:
    """Whether what is drawn of a variant is shown, in all charts; a flat line has no height."""
    script = f"[...document.querySelectorAll('svg .{group}')].map(e => getComputedStyle(e).display)"
    return {style != "none" for style in page.evaluate(script)}


def test_a_chip_hides_the_lines_of_its_variant_in_all_charts(browser: Any, reports: Any) -> None:
    page = opened(browser, reports["comparison"])
    assert displayed(page, "v1") == {True}
    assert page.locator("figure[data-chart] svg .v1").count() > 10

    chip = page.get_by_role("button", name="distilled")
    chip.focus()
    page.keyboard.press("Enter")
    assert chip.get_attribute("aria-pressed") == "false"
    assert displayed(page, "v1") == {False}
    assert displayed(page, "v0") == {True}

    chip.click()
    assert displayed(page, "v1") == {True}
    assert len(page.heard) == 1


@pytest.mark.parametrize(("scheme", "first", "then"), [("light", 246, 13), ("dark", 13, 246)])
def test_the_switch_turns_the_colours_of_page_and_charts(
    browser: Any, reports: Any, scheme: str, first: int, then: int
) -> None:
    page = opened(browser, reports["run"], scheme=scheme)
    body = "getComputedStyle(document.body).backgroundColor"
    chart = "getComputedStyle(document.querySelector('svg .v0 path')).stroke"
    assert page.evaluate(body).startswith(f"rgb({first},")
    before = page.evaluate(chart)
    page.locator("button.theme").click()
    assert page.evaluate(body).startswith(f"rgb({then},")
    assert page.evaluate(chart) != before


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_nothing_is_wider_than_a_telephone(browser: Any, reports: Any, name: str) -> None:
    page = opened(browser, reports[name], width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = "[...document.querySelectorAll('section, figure, table')].map(e => e.scrollWidth)"
    assert max(page.evaluate(wide)) <= 390


def test_the_values_at_the_pointer_are_read_out(browser: Any, reports: Any) -> None:
    page = opened(browser, reports["comparison"])
    figure = page.locator("figure[data-chart]", has_text="weight of self_distillation")
    svg = figure.locator("svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    assert figure.locator(".readout").inner_text() == "step 21: distilled 1"
    page.mouse.move(0, 0)
    assert figure.locator(".readout").inner_text() == ""


def test_details_open(browser: Any, reports: Any) -> None:
    page = opened(browser, reports["comparison"])
    text = page.locator("details", has_text="config of baseline").locator("pre")
    assert not text.is_visible()
    page.get_by_text("config of baseline").click()
    assert text.is_visible()
