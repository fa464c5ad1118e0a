"""Renew the pictures of the studio in docs/images/studio; needs Chromium and playwright.

python tools/studio_screenshots.py [FOLDER]
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

FOLDER = Path(__file__).resolve().parents[1] / "docs/images/studio"
DESKTOP, PHONE = (1280, 860), (390, 844)


def main() -> None:
    """Serve a studio, use each of its tabs, and take the pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        os.environ["MAR_HOME"] = home
        from mar.app.server import launch

        server = launch(block=False)
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                for scheme, size, name in (
                    ("light", DESKTOP, "light"),
                    ("dark", DESKTOP, "dark"),
                    ("light", PHONE, "phone"),
                ):
                    names = {tab: f"{tab}-{name}" for tab in ("draw", "edit", "compare")}
                    take(browser, server.url, folder, scheme, size, **names)
                browser.close()
        finally:
            server.close()


def take(
    browser: Browser, url: str, folder: Path, scheme: str, size: tuple[int, int], *, draw: str | None = None,
    edit: str | None = None, compare: str | None = None,
) -> None:  # fmt: skip
    """Take the pictures that have a name.

    Args:
        browser, url: where the studio is.
        folder: of the pictures.
        scheme: light or dark.
        size: of the window.
        draw, edit, compare: names of the tabs' pictures.
    """
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    expect.set_options(timeout=120_000)
    page.goto(url)
    expect(page.locator(".preset small", has_text="s a picture")).to_have_count(3)  # measured
    press(page, "draw")
    if draw:
        page.fill("#scrub", "17")  # a few tokens are missing
        save(page, folder / f"{draw}.png")
        page.fill("#scrub", "20")
    if edit:
        page.click("#draw-details button:has-text('Edit')")
        paint(page, (6, 0), (0, 0), (0, 1), (6, 1))
        paint(page, (6, 6), (0, 6), (0, 5), (6, 5))
        page.fill("#edit-asks-input", "Pullover")  # sleeves of a T-shirt become long ones
        page.keyboard.press("Enter")
        press(page, "edit")
        page.mouse.move(0, 0)
        save(page, folder / f"{edit}.png")
    if compare:
        page.click("#tab-compare")
        press(page, "compare")
        save(page, folder / f"{compare}.png")
    page.close()


def press(page: Page, tab: str) -> None:
    """Press a tab's main button, and wait for the end."""
    page.click(f"#{tab}-go")
    expect(page.locator(f"#{tab}-go")).to_be_enabled()


def paint(page: Page, *tokens: tuple[int, int]) -> None:
    """Drag the mouse over these tokens of the easel."""
    box = page.locator("#easel").bounding_box()
    assert box is not None
    for i, (row, column) in enumerate(tokens):
        page.mouse.move(box["x"] + (column + 0.5) * box["width"] / 7, box["y"] + (row + 0.5) * box["height"] / 7)
        if i == 0:
            page.mouse.down()
    page.mouse.up()


def save(page: Page, path: Path) -> None:
    """Save what the window shows, as a small file."""
    with Image.open(BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    main()
