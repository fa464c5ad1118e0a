"""Renew the pictures of the studio in docs/images/studio; needs Chromium and playwright.

python tools/studio_screenshots.py [FOLDER] [--model emoji] [--prompt "a pizza" ...] [--edit "red heart"]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

FOLDER = Path(__file__).resolve().parents[1] / "docs/images/studio"
DESKTOP, PHONE = (1280, 860), (390, 844)


def main() -> None:
    """Serve a studio, use each of its tabs, and take the pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--model", help="as `mar app` takes it; by default its own")
    parser.add_argument("--prompt", nargs="+", help="to draw and compare, for a model that draws from words")
    parser.add_argument("--edit", help="class or prompt to draw in the painted part")
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        os.environ["MAR_HOME"] = home
        from mar.app.server import launch

        server = launch([options.model] if options.model else [], block=False)
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                for scheme, size, name in (
                    ("light", DESKTOP, "light"),
                    ("dark", DESKTOP, "dark"),
                    ("light", PHONE, "phone"),
                ):
                    names = {tab: f"{tab}-{name}" for tab in ("draw", "edit", "compare")}
                    words = {"prompts": options.prompt, "change": options.edit}
                    take(browser, server.url, folder, scheme, size, **words, **names)
                browser.close()
        finally:
            server.close()


def take(
    browser: Browser, url: str, folder: Path, scheme: str, size: tuple[int, int], *,
    prompts: list[str] | None = None, change: str | None = None, draw: str | None = None, edit: str | None = None,
    compare: str | None = None,
) -> None:  # fmt: skip
    """Take the pictures that have a name.

    Args:
        browser, url: where the studio is.
        folder: of the pictures.
        scheme: light or dark.
        size: of the window.
        prompts: to draw and compare, for a model that draws from words (None: its first example).
        change: class or prompt to draw in the painted part (None: Pullover, or the same prompt).
        draw, edit, compare: names of the tabs' pictures.
    """
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    expect.set_options(timeout=120_000)
    page.goto(url)
    expect(page.locator(".preset small", has_text="s a picture")).to_have_count(3)  # measured
    words = page.locator("#draw-asks textarea").is_visible()
    if words and prompts:
        page.fill("#draw-asks-input", "\n".join(prompts))
        page.fill("#count", str(max(1, 4 // len(prompts))))
    press(page, "draw")
    steps = int(page.locator("#scrub").get_attribute("max") or 0)
    if draw:
        page.fill("#scrub", str(round(0.85 * steps)))  # a few tokens are missing
        save(page, folder / f"{draw}.png")
        page.fill("#scrub", str(steps))
    if edit:
        page.click("#draw-details button:has-text('Edit')")
        if words:
            page.click("text=Rectangle")
            paint(page, (0, 0), (3, 6))  # the upper half
            if change:
                page.fill("#edit-asks-input", change)
        else:
            paint(page, (6, 0), (0, 0), (0, 1), (6, 1))
            paint(page, (6, 6), (0, 6), (0, 5), (6, 5))
            page.fill("#edit-asks-input", change or "Pullover")  # sleeves of a T-shirt become long ones
            page.keyboard.press("Enter")
        press(page, "edit")
        page.mouse.move(0, 0)
        save(page, folder / f"{edit}.png")
    if compare:
        page.click("#tab-compare")
        if words and prompts:
            page.fill("#compare-asks-input", "\n".join(prompts))
        press(page, "compare")
        save(page, folder / f"{compare}.png")
    page.close()


def press(page: Page, tab: str) -> None:
    """Press a tab's main button, and wait for the end."""
    page.click(f"#{tab}-go")
    expect(page.locator(f"#{tab}-go")).to_be_enabled()


def paint(page: Page, *tokens: tuple[int, int]) -> None:
    """Drag the mouse over these sevenths of the easel."""
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
