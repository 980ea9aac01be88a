"""A picture of a page; the README's, after `make demo`:

    python scripts/page_picture.py runs/demo/eval/page.html docs/page.png

Needs playwright (`pip install 'linearize[browser]'`) and a Chromium, which is looked for on the PATH.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path
from shutil import which

COLORS = 128
"""A palette of so many: a third of the size, and nothing to see of it."""


def main() -> None:
    """Render, cut, and write a PNG of few colors."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280, help="of the window, pixels")
    parser.add_argument("--height", type=int, default=1600, help="that are kept from the top")
    parser.add_argument("--scale", type=float, default=1.0, help="of the picture")
    options = parser.parse_args()
    browser_path = which("chromium") or which("chromium-browser") or which("google-chrome")
    if browser_path is None:
        raise SystemExit("no Chromium on the PATH: apt-get install chromium, or the like")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(
            viewport={"width": options.width, "height": options.height}, device_scale_factor=options.scale
        )
        tab.goto(options.page.resolve().as_uri())
        tab.wait_for_selector("html[data-drawn]")
        shot = tab.screenshot()
        browser.close()
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    Image.open(BytesIO(shot)).convert("RGB").quantize(COLORS).save(options.picture, optimize=True)
    print(f"{options.picture}  {options.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
