"""Take a picture of a run's page for the docs; needs Chromium and playwright.

python tools/run_page_screenshot.py RUN [PNG]
"""

from __future__ import annotations

import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PNG = Path(__file__).resolve().parents[1] / "docs/images/run-page.png"
WIDTH, HEIGHT = 1200, 800


def main() -> None:
    """Open the page as a file, and take all of it."""
    page_file = Path(sys.argv[1], "index.html").resolve()
    png = Path(sys.argv[2]) if len(sys.argv) > 2 else PNG
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(page_file.as_uri())
        with Image.open(BytesIO(page.screenshot(full_page=True))) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(png, optimize=True)
        browser.close()
    print(f"{png}: {png.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
