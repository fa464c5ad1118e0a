"""The page of a run in a real browser, opened as a file."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from chromium import ARGUMENTS, CHROMIUM
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from mar.training.page import Page
from mar.training.page_html import Stage, draw_commands

LONG = "a-very-long-name-of-a-class-or-of-a-folder-that-has-no-place-to-break"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium with a fresh profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a run with a tokenizer, in the midst of its model's training."""
    root = tmp_path_factory.mktemp("runs") / f"{LONG} & <b>#1?%20"
    tokenizer = root / "tokenizer"
    for folder, size in ((tokenizer, (512, 128)), (root, (10 * 64, 4 * 64))):
        (folder / "samples").mkdir(parents=True)
        for images in range(100, 900, 100):
            Image.new("RGB", size, (images // 4, 80, 120)).save(folder / "samples" / f"{images:012d}.png")
    stages = [Stage("tokenizer", tokenizer, 800), Stage("latents", root / "latents"), Stage("model", root, 1600)]
    page = Page(root, stages, draw_commands(root))
    page.begin("tokenizer", 0, 800, sample_every=100)
    for images in range(100, 900, 10):
        page.write(images, {"loss": 1 / images, "psnr": 20 + images / 100})
    page.write_image(800, "reconstructions", Image.new("RGB", (512, 128)))
    page.finished = True
    page.close()
    page.begin("model", 800, 1600, sample_every=100, classes=(LONG, *map(str, range(9))))
    for images in range(10, 900, 10):
        page.write(images, {"loss": 0.3 + 1 / images})
    page.advance(900)
    page.write(900, {"val_loss": 0.4})
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_page_fits_a_window_of_any_width(browser: Browser, page: Page, scheme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    told: list[str] = []
    asked: list[str] = []
    context.on("console", lambda message: told.append(message.text))
    context.on("weberror", lambda error: told.append(str(error.error)))
    context.on("requestfailed", lambda request: told.append(request.url))
    context.on("request", lambda request: asked.append(request.url))
    shown = context.new_page()
    shown.goto(page.uri)
    assert shown.title() == f"56% model · {page.root.name}"
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    wider = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    assert shown.evaluate(f"{wider}.map(e => e.outerHTML)") == []
    assert shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert shown.locator("img").count() == 1 + 5 + 1  # a strip for the model alone
    assert shown.locator(".chart polyline").count() == 3
    light = shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 246, 249)"
    assert light == (scheme == "light")
    context.close()
    assert told == []
    assert len(asked) > 1
    assert {urlsplit(url).scheme for url in asked} == {"file"}
