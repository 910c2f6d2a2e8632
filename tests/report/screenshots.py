"""Pictures of a report for the documentation: `python -m tests.report.screenshots FOLDER`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lightning_aux.cli import main as lightning_aux
from tests.report.browser import chromium

IMAGES = Path("docs/images")
SCREENS = {
    "desktop": (1200, 1500, "light"),
    "dark": (1200, 1500, "dark"),
    "phone": (390, 1500, "light"),
}
BEGINS_AT = {"desktop": "h1", "dark": ".chips", "phone": ".chips"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/images/report_*.png.")
    parser.add_argument("folder", type=Path, help="of the comparison")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        page_file = Path(scratch) / "report.html"
        lightning_aux(["report", str(folder), "--output", str(page_file)])
        for name, (width, height, scheme) in SCREENS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(page_file.as_uri())
            top = f"document.querySelector('{BEGINS_AT[name]}').getBoundingClientRect().top - 24"
            page.evaluate(f"scrollTo(0, {top})")
            page.screenshot(path=IMAGES / f"report_{name}.png")
            print(f"wrote {IMAGES / f'report_{name}.png'}")


if __name__ == "__main__":
    main()
