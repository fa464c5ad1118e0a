"""The studio's page in a real browser: what people see and do there, against what the library draws."""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from chromium import ARGUMENTS, CHROMIUM
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from tiny import FAST, tiny_model
from words_model import EXAMPLES, words_pipeline

import mar
from mar.assets import imagenet_classes
from mar.config import SamplingConfig
from mar.pipeline import Pipeline
from mar.tokenizer import PixelTokenizer

pytest.importorskip("gradio", reason="the studio needs gradio: pip install '.[app]'")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16x16 pixels in color with a thousand classes, two of the same name."""
    path = tmp_path_factory.mktemp("models") / "thousand.safetensors"
    names = [name.split(" (")[0] if name.startswith("crane") else name for name in imagenet_classes()]
    model = tiny_model(channels=3, grid=(16, 16), patch_size=4, classes=len(names))
    sampling = SamplingConfig(**{**FAST.__dict__, "x0_bound": 3.0})
    Pipeline(model, PixelTokenizer(3, mean=-0.4, std=0.5), classes=names, sampling=sampling).save(path)
    return path


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8x16 pixels without classes."""
    path = tmp_path_factory.mktemp("models") / "nameless.safetensors"
    model = tiny_model(channels=1, grid=(8, 16), patch_size=4, classes=0)
    sampling = SamplingConfig(**{**FAST.__dict__, "x0_bound": 3.0})
    Pipeline(model, PixelTokenizer(1, mean=-0.4, std=0.5), sampling=sampling).save(path)
    return path


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16x16 pixels that draws from words."""
    path = tmp_path_factory.mktemp("models") / "worded.safetensors"
    pipeline = words_pipeline(grid=(16, 16), patch_size=4)
    pipeline.sampling = SamplingConfig(**{**FAST.__dict__, "x0_bound": 3.0})
    pipeline.save(path)
    return path


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, thousand: Path, nameless: Path, worded: Path) -> Iterator[str]:
    """The address of a `mar app`."""
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "MAR_HOME": str(folder / "home"), "PYTHONPATH": os.pathsep.join(paths)}
    models = ["fashion", str(thousand), str(nameless), str(worded)]
    command = [sys.executable, "-m", "mar", "app", *models, "--no-browser"]
    output = folder / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"], stdout=file, stderr=file, env=environment
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while (said := re.search(r"the studio is at (http://\S+)", output.read_text())) is None:
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        yield said[1]
        assert "Traceback" not in output.read_text()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium with a fresh profile."""
    expect.set_options(timeout=PATIENCE_S * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Opener:
    """Opens the page in windows of their own, and watches what they ask for and complain about."""

    browser: Browser
    url: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    contexts: list[BrowserContext] = field(default_factory=list)

    def __call__(self, width: int = 1280, height: int = 900, **options: Any) -> Page:
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(PATIENCE_S * 1000)
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("weberror", lambda error: self.errors.append(str(error.error)))
        context.on("console", lambda message: self._heard(message.type, message.text))
        self.contexts.append(context)
        return self.tab(context)

    def tab(self, context: BrowserContext) -> Page:
        page = context.new_page()
        page.goto(self.url)
        expect(page.locator("#draw-pictures canvas").first).to_be_visible()
        return page

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.errors.append(text)


@pytest.fixture
def opener(browser: Browser, url: str) -> Iterator[Opener]:
    """Opens pages; no request of theirs leaves the studio, and their scripts fail nowhere."""
    opener = Opener(browser, url)
    yield opener
    for context in opener.contexts:
        context.close()
    assert opener.requests
    for request in map(urlsplit, opener.requests):
        assert request.scheme in ("data", "blob") or request.netloc == urlsplit(url).netloc, request.geturl()
    assert not opener.errors


@pytest.fixture(scope="module")
def fashion() -> Pipeline:
    return mar.load("fashion", device="cpu")


# ---- what one does, and what one sees


def set_classes(page: Page, tab: str, *names: str) -> None:
    """Choose these classes instead of the ones there are, by typing."""
    for remove in page.locator(f"#{tab}-asks .chip button").all()[::-1]:
        remove.click()
    for name in names:
        page.fill(f"#{tab}-asks-input", name)
        page.keyboard.press("Enter")


def chips(page: Page, tab: str) -> list[str]:
    return [text.removesuffix("×") for text in page.locator(f"#{tab}-asks .chip").all_text_contents()]


def finish(page: Page, tab: str) -> None:
    """Wait until nothing is drawn any more."""
    expect(page.locator(f"#{tab} .go .primary")).to_be_enabled()


def draw(page: Page, tab: str = "draw") -> None:
    page.click(f"#{tab}-go")
    finish(page, tab)


def canvas(page: Page, selector: str = "#draw-pictures canvas") -> str:
    """Return a canvas as it is now, as a data URL."""
    url: str = page.locator(selector).first.evaluate("canvas => canvas.toDataURL()")
    return url


def pixels(url: str | None) -> Pixels:
    """Decode a data URL."""
    assert url is not None
    return np.asarray(Image.open(BytesIO(base64.b64decode(url.split(",")[1]))))


def saved(page: Page, tab: str, name: str = "Save PNG") -> Pixels:
    """Return the picture behind a link of the details."""
    return pixels(page.locator(f"#{tab}-details a", has_text=name).get_attribute("href"))


def per_pixel(tokens: Any, size: int = 4) -> NDArray[np.bool_]:
    """Return for each pixel whether its token is chosen."""
    return np.kron(np.asarray(tokens), np.ones((size, size), dtype=bool))


def settings(page: Page, **values: object) -> None:
    """Fill in More settings."""
    if not page.locator("#more").evaluate("more => more.open"):
        page.click("#more summary")
    for name, value in values.items():
        page.fill(f"#setting-{name}", str(value))


def paint(page: Page, *tokens: tuple[int, int], grid: int = 7) -> None:
    """Drag the mouse over the easel from token to token."""
    box = page.locator("#easel").bounding_box()
    assert box is not None
    for i, (row, column) in enumerate(tokens):
        page.mouse.move(box["x"] + (column + 0.5) * box["width"] / grid, box["y"] + (row + 0.5) * box["height"] / grid)
        if i == 0:
            page.mouse.down()
    page.mouse.up()


def drop(page: Page, path: Path, name: str) -> None:
    """Drop a file on the page."""
    data = page.evaluate_handle(
        """([content, name]) => {
          const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], name));
          return data;
        }""",
        [base64.b64encode(path.read_bytes()).decode(), name],
    )
    page.dispatch_event("main", "drop", {"dataTransfer": data})


def painted(page: Page, count: int, of: int = 49) -> None:
    expect(page.locator("#painted")).to_have_text(f"{count} of {of} tokens")


def notice(page: Page) -> Locator:
    return page.locator("#notice span")


# ---- the tests


def test_draw_live_reveal_ends_in_the_picture_of_the_library(opener: Opener, fashion: Pipeline) -> None:
    page = opener()
    set_classes(page, "draw", "boot")
    assert chips(page, "draw") == ["Ankle boot"]
    page.fill("#seed", "7")
    settings(page, steps=49, diffusion_steps=100)
    page.keyboard.press("Enter")
    expect(page.locator("#draw .progress output")).to_contain_text("step")
    seen = [canvas(page)]
    while page.locator("#draw .stop").is_visible():
        seen.append(canvas(page))
    finish(page, "draw")
    # Live reveal: they grow. At the end it is what the library draws.
    assert len(set(seen)) >= 5
    expect(page.locator("#draw .progress output")).to_contain_text("49 steps in")
    options: dict[str, Any] = {"steps": 49, "diffusion_steps": 100}
    [image] = fashion.sample(labels=["Ankle boot"], seeds=[7], **options)
    with page.expect_download() as download:
        page.click("#draw-details a:has-text('Save PNG')")
    assert download.value.suggested_filename == "ankle-boot-7.png"
    first = np.asarray(Image.open(download.value.path()))
    assert np.array_equal(first, np.asarray(image))
    assert page.locator("#draw-details pre").inner_text() == (
        "mar sample fashion --labels 'Ankle boot' --seed 7 --steps 49 --diffusion-steps 100"
    )
    # The scrubber goes back and forth; the order lies over it.
    end = canvas(page)
    page.fill("#scrub", "30")
    middle = canvas(page)
    page.fill("#scrub", "49")
    assert canvas(page) == end != middle
    page.fill("#scrub", "30")
    assert canvas(page) == middle
    page.check("#order")
    assert canvas(page) != middle
    page.uncheck("#order")
    assert canvas(page) == middle
    # What is revealed stays to the bit, the rest is drawn with another seed.
    settings(page, diffusion_steps=10)
    page.click("#again")
    finish(page, "draw")
    revealed = next(fashion.reveal(["Ankle boot"], [7], **options)).revealed_at[0].numpy()
    kept, second = per_pixel(revealed <= 30), saved(page, "draw")
    assert np.array_equal(second[kept], first[kept])
    assert not np.array_equal(second[~kept], first[~kept])


def test_draw_that_waits_is_withdrawn_at_once(opener: Opener) -> None:
    """While somebody else's pictures are drawn; its cards stay until then, whatever is typed."""
    first, second = opener(), opener()
    settings(first, steps=49, diffusion_steps=1000)
    first.click("#draw-go")
    expect(first.locator("#draw .progress output")).to_contain_text("step")
    cards = second.locator("#draw-pictures .card")
    second.fill("#count", "1")
    before = cards.count()
    second.click("#draw-go")
    expect(second.locator("#draw .progress output")).to_contain_text("waiting for its turn")
    second.fill("#count", "2")
    expect(cards).to_have_count(before)
    second.keyboard.press("Escape")
    expect(second.locator("#draw .stop")).to_be_hidden()
    expect(cards).to_have_count(2 * before)
    expect(first.locator("#draw .stop")).to_be_visible()
    first.keyboard.press("Escape")
    finish(first, "draw")


def test_draw_when_stopped_ends_within_a_step(opener: Opener) -> None:
    page = opener()
    page.fill("#count", "2")
    settings(page, steps=49, diffusion_steps=1000)
    progress = page.locator("#draw .progress output")
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#draw .stop")):
        page.click("#draw-go")
        expect(progress).to_contain_text(re.compile(r"step [1-9]\d* of 49 "))
        before = int(progress.inner_text().split()[1])
        stop()
        expect(progress).to_contain_text("stopped at step")
        after = int(progress.inner_text().split()[3])
        assert before <= after <= before + 3  # of which the page may have shown two late
        finish(page, "draw")
        expect(page.locator("#scrub-text")).to_have_text(f"step {after} of 49")
        expect(page.locator("#scrub")).to_have_attribute("max", str(after))  # there is nothing behind it
        expect(page.locator("#draw .stop")).to_be_hidden()
    page.click("#more button:has-text('Reset all')")
    page.click("[name=preset][value=fast]")
    draw(page)
    expect(progress).to_contain_text("8 steps in")
    assert page.locator("#history img").count() == 8


def test_edit_with_the_mouse_keeps_what_is_not_painted(opener: Opener) -> None:
    page = opener()
    page.click("#tab-edit")
    expect(page.locator("#easel-empty")).to_be_visible()
    page.click("#empty-draw")
    set_classes(page, "draw", "Dress")
    page.click("[name=preset][value=fast]")
    draw(page)
    original = saved(page, "draw")
    page.click("#draw-details button:has-text('Edit')")
    assert chips(page, "edit") == ["Dress"]
    # Tools, by what they paint.
    paint(page, (0, 3), (6, 3))
    painted(page, 7)
    page.click("#undo")
    painted(page, 0)
    page.click("#redo")
    painted(page, 7)
    page.click("#mask-invert")
    painted(page, 42)
    page.click("#mask-clear")
    painted(page, 0)
    page.click("text=Rectangle")
    paint(page, (1, 1), (5, 5), (3, 4))
    painted(page, 12)
    page.click("#mask-keep")
    painted(page, 37)
    page.click("#mask-keep")
    page.click("text=Eraser")
    paint(page, (2, 0), (2, 6))
    painted(page, 8)
    page.click("#mask-all")
    painted(page, 49)
    page.click("#mask-clear")
    page.click("#edit-go")
    expect(notice(page)).to_contain_text("nothing is painted")
    for vary in ("#vary-random", "#vary-unsure"):
        page.click(vary)
        painted(page, 20)
        page.click("#mask-clear")
        painted(page, 0)
    # Painted tokens are drawn again with another class; all else is the original to the bit.
    page.click("text=Brush")
    page.fill("#brush", "3")
    paint(page, (1, 3), (1, 4))
    painted(page, 12)
    set_classes(page, "edit", "Sandal")
    draw(page, "edit")
    tokens = np.zeros((7, 7), dtype=bool)
    tokens[0:3, 2:6] = True
    inside, variants = per_pixel(tokens), []
    for i in range(4):
        page.locator("#variants .card").nth(i).click()
        variants.append(saved(page, "edit"))
        assert np.array_equal(variants[i][~inside], original[~inside])
        assert not np.array_equal(variants[i][inside], original[inside])
    assert len({variant.tobytes() for variant in variants}) == 4
    assert np.array_equal(saved(page, "edit", "known.png"), original)
    assert np.array_equal(saved(page, "edit", "mask.png")[..., 0] == 255, inside)
    # The slider shows the one or the other; what is taken on is edited further.
    page.fill("#slider input", "250")
    assert page.locator("#slider canvas").nth(1).evaluate("canvas => canvas.style.clipPath") == "inset(0px 0px 0px 25%)"
    page.click("text=Take this one on")
    expect(page.locator("#variants .card")).to_have_count(0)
    painted(page, 0)
    page.click("[aria-label='Move right']")
    painted(page, 7)
    draw(page, "edit")
    shifted = saved(page, "edit", "known.png")[..., 0]
    assert np.array_equal(shifted[:, 4:], variants[3][:, :-4])
    assert np.array_equal(saved(page, "edit")[:, 8:], variants[3][:, 4:-4])


def test_compare_draws_each_setting_and_tells_its_seconds(opener: Opener, fashion: Pipeline) -> None:
    page = opener()
    settings(page, steps=3)  # for Draw alone
    page.click("#tab-compare")
    set_classes(page, "compare", "Bag", "Sneaker")
    page.fill("#compare-seed", "5")
    page.locator("#columns [name=steps]").first.fill("6")
    page.locator("#columns [name=guidance_scale]").first.fill("2")
    expect(page.locator("#table .card")).to_have_count(6)
    assert page.locator("#table h3").all_inner_texts() == ["exact, steps 6, guidance 2", "balanced", "fast"]
    page.keyboard.press("Enter")
    for time_shown in page.locator("#table small").all():
        expect(time_shown).to_have_text(re.compile(r"^\d[\d.]* s · \d[\d.]* s a picture$"))
    finish(page, "compare")
    for column, options in enumerate([{"steps": 6, "guidance_scale": 2.0}, {"preset": "balanced"}, {"preset": "fast"}]):
        page.locator(".compared").nth(column).locator(".card").nth(1).click()
        [image] = fashion.sample(labels=["Sneaker"], seeds=[6], **options)
        assert np.array_equal(saved(page, "compare"), np.asarray(image))
    assert page.locator("#compare-details pre").inner_text().endswith("--labels Sneaker --seed 6 --preset fast")
    # Settings are removed and added.
    page.locator("#columns [title='Remove these settings']").last.click()
    expect(page.locator("#columns .column")).to_have_count(2)
    page.click("#add-column")
    expect(page.locator("#columns .column")).to_have_count(3)
    # A saved picture dropped on the page brings its settings back.
    page.locator(".compared").first.locator(".card").nth(1).click()
    first = saved(page, "compare")
    with page.expect_download() as download:
        page.click("#compare-details a:has-text('Save PNG')")
    drop(page, download.value.path(), "sneaker.png")
    expect(notice(page)).to_have_text("settings restored from sneaker.png: Draw makes it again")
    assert page.locator("#draw").is_visible()
    assert chips(page, "draw") == ["Sneaker"]
    shown = [page.input_value(name) for name in ("#seed", "#setting-steps", "#setting-guidance_scale", "#count")]
    assert shown == ["6", "6", "2", "1"]
    assert page.is_checked("[name=preset][value=exact]")
    assert page.locator("#more summary output").inner_text() == "2 changed"
    draw(page)
    assert np.array_equal(saved(page, "draw"), first)
    # With a preset, too; what was edited says that Draw can't repeat it.
    page.click("#tab-compare")
    page.locator(".compared").nth(2).locator(".card").first.click()
    with page.expect_download() as download:
        page.click("#compare-details a:has-text('Save PNG')")
    page.set_input_files("#file", download.value.path())
    expect(page.locator("[name=preset][value=fast]")).to_be_checked()
    assert page.locator("#more summary output").inner_text() == ""
    assert chips(page, "draw") == ["Bag"]
    edited = PngInfo()
    edited.add_text("mar", '{"seed": 9, "label": 0, "edited": true}')
    path = download.value.path().with_name("edited.png")
    Image.new("L", (28, 28), 99).save(path, pnginfo=edited)
    drop(page, path, "edited.png")
    expect(notice(page)).to_contain_text("restored from edited.png: it was painted over")


def test_page_tells_errors_in_one_line(opener: Opener, tmp_path: Path) -> None:
    page = opener()
    strange = PngInfo()
    strange.add_text("mar", '{"seed": 1, "label": 0, "solver": "no such"}')
    Image.new("L", (28, 28), 99).save(tmp_path / "strange.png", pnginfo=strange)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (tmp_path / "page.png").write_text("<html><script>alert(1)</script></html>")

    def told(pattern: str) -> None:
        expect(notice(page)).to_have_text(re.compile(pattern))
        text = notice(page).inner_text()
        assert len(text) < 500
        assert not re.search(r"\n|Traceback|Error\(|File \"", text), text

    page.set_input_files("#file", tmp_path / "broken.png")
    told("picture.*broken|picture.*not|can't be")
    page.click("#notice button")
    expect(page.locator("#notice")).to_be_hidden()
    page.set_input_files("#file", tmp_path / "page.png")
    told("picture")
    page.set_input_files("#file", tmp_path / "strange.png")
    told("strange.png: its settings do not fit this model: .*no such")
    page.click("#tab-draw")
    page.click("[name=preset][value=fast]")
    settings(page, steps="many")
    page.click("#draw-go")
    told("steps: got many, expected a number")
    for values, pattern in (
        ({"steps": "2.5"}, "steps: got 2.5, expected a whole number"), ({"steps": "-3"}, "steps"),
        ({"steps": "", "diffusion_steps": "1e9"}, "diffusion_steps"),
    ):  # fmt: skip
        settings(page, **values)
        draw(page)
        told(pattern)
    answer = page.evaluate(
        """() => import("/static/api.js").then(({ ask }) => ask("draw", "fashion", [1], [1], "fast", { colour: 3 }))
          .catch((error) => error.message)"""
    )
    assert answer.startswith("settings: got 'colour', expected some of steps, ")
    # After all of that it draws.
    settings(page, diffusion_steps="")
    draw(page)
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#draw .progress output")).to_contain_text("8 steps in")


def test_tabs_do_not_see_the_pictures_of_each_other(opener: Opener, thousand: Path, nameless: Path) -> None:
    one = opener()
    other = opener.tab(one.context)
    blank = canvas(other)
    one.bring_to_front()
    one.select_option("#model", str(thousand))
    expect(one.locator("#draw-asks .chip").first).to_have_text("tench×")
    # Two classes have this name: they are told apart by their numbers.
    one.fill("#draw-asks-input", "crane")
    assert one.locator("#draw-asks [role=option]").all_inner_texts() == ["crane (134)\n134", "crane (517)\n517"]
    set_classes(one, "draw", "crane")
    assert chips(one, "draw") == ["crane (134)"]
    draw(one)
    assert "--labels 134 " in one.locator("#draw-details pre").inner_text()
    expected = mar.load(thousand, device="cpu").sample(labels=[134], seeds=[0])
    assert np.array_equal(saved(one, "draw"), np.asarray(expected[0]))
    one.select_option("#model", str(nameless))
    expect(one.locator("#draw-asks")).to_have_text("This model has no classes to choose from.")
    one.fill("#count", "2")
    draw(one)
    expect(one.locator("#draw-pictures .card")).to_have_count(2)
    # A picture of another model is cropped to this one's size.
    one.locator("#history button").last.click()
    painted(one, 0, of=8)
    assert one.locator("#history img").count() == 3
    assert canvas(other) == blank
    expect(other.locator("#history")).to_be_hidden()
    assert other.locator("#history img").count() == 0


def test_page_on_a_phone_draws_and_edits_without_scrolling_sideways(opener: Opener) -> None:
    page = opener(390, 844, has_touch=True, is_mobile=True, device_scale_factor=2)

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == 390

    fits()
    settings(page, steps=5)
    fits()
    expect(page.locator("#draw-go")).to_be_in_viewport(ratio=1)
    page.tap("#draw-go")
    finish(page, "draw")
    expect(page.locator("#draw-pictures canvas").first).to_be_in_viewport()
    expect(page.locator("#scrubber")).to_be_visible()
    fits()
    page.tap("#draw-details button:has-text('Edit')")
    page.locator("#easel").tap(position={"x": 20, "y": 20})
    painted(page, 1)
    page.tap("#edit-go")
    finish(page, "edit")
    expect(page.locator("#variants canvas").first).to_be_in_viewport()
    expect(page.locator("#slider")).to_be_visible()
    fits()
    page.tap("#tab-compare")
    page.tap("#compare-go")
    finish(page, "compare")
    page.locator("#table .card").first.tap()
    fits()


def choose_words(page: Page, worded: Path) -> Locator:
    """Choose the model that draws from words; returns the field of its prompts."""
    page.select_option("#model", str(worded))
    field = page.locator("#draw-asks textarea")
    expect(field).to_have_value(EXAMPLES[0])
    return field


def test_prompt_is_completed_by_the_keyboard_and_drawn(opener: Opener, worded: Path) -> None:
    page = opener()
    field, note = choose_words(page, worded), page.locator("#draw-asks output")
    options = page.locator("#draw-asks [role=option]")
    expect(page.locator("#draw-pictures .card")).to_have_count(4)  # of one prompt
    field.fill("")
    page.keyboard.type("red be")
    assert options.all_inner_texts() == ["bee", "beetle"]
    assert page.locator("#draw-asks [aria-selected=true]").inner_text() == "bee"
    page.keyboard.press("ArrowDown")
    assert field.get_attribute("aria-activedescendant") == options.nth(1).get_attribute("id")
    page.keyboard.press("Enter")
    expect(field).to_have_value("red beetle")
    expect(options.first).to_be_hidden()
    # A whole word is not completed by Enter; Escape closes the list, and the prompt stays.
    field.fill("")
    page.keyboard.type("red bee")
    assert options.all_inner_texts() == ["beetle"]
    expect(page.locator("#draw-asks [aria-selected=true]")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(options.first).to_be_hidden()
    page.keyboard.type(" an")
    options.first.click()
    expect(field).to_have_value("red bee ant")
    page.fill("#count", "2")
    field.focus()
    page.keyboard.press("Enter")
    finish(page, "draw")
    expect(page.locator("#draw-pictures .card span")).to_have_text(["red bee ant · 0", "red bee ant · 1"])
    expected = mar.load(worded, device="cpu").sample(prompts=["red bee ant"] * 2, seeds=[0, 1])
    for i, image in enumerate(expected):
        page.locator("#draw-pictures .card").nth(i).click()
        assert np.array_equal(saved(page, "draw"), np.asarray(image))
    code = page.locator("#draw-details pre").inner_text()
    assert code == f"mar sample {worded} --prompt 'red bee ant' --seed 1"
    expect(note).to_have_text("")


def test_prompt_with_unknown_words_is_told_below_the_field(opener: Opener, worded: Path) -> None:
    page = opener()
    field, note = choose_words(page, worded), page.locator("#draw-asks output")
    field.fill("a red antt")
    expect(note).to_have_text("unknown words: antt (ant?); left out")
    draw(page)
    expect(page.locator("#notice")).to_be_hidden()
    field.fill("xyz")
    expect(note).to_have_text("unknown words: xyz; expected some of the 7 words that this model knows")
    expect(note).to_have_class("hint wrong")
    draw(page)
    expect(notice(page)).to_contain_text("unknown words: xyz")
    field.fill("x" * 301)
    expect(note).to_contain_text("got 301 characters, expected at most 300")
    page.click("#draw-asks .examples button >> nth=1")
    expect(field).to_have_value(EXAMPLES[1])
    expect(note).to_be_hidden()
    # Nothing at all is asked for, too.
    field.fill("")
    draw(page)
    expect(page.locator("#draw-pictures .card span").first).to_contain_text("no prompt · ")
    assert "--prompt '' --seed" in page.locator("#draw-details pre").inner_text()


def test_prompts_a_line_each_are_drawn_edited_compared_and_restored(opener: Opener, worded: Path) -> None:
    page = opener()
    field = choose_words(page, worded)
    page.click("#draw-asks .examples button >> nth=0")
    page.keyboard.press("Tab")
    field.press("End")
    page.keyboard.press("Shift+Enter")
    page.click("#draw-asks .examples button >> nth=1")
    expect(field).to_have_value("\n".join(EXAMPLES))
    page.fill("#count", "1")
    draw(page)
    captions = [f"{prompt} · {seed}" for seed, prompt in enumerate(EXAMPLES)]
    expect(page.locator("#draw-pictures .card span")).to_have_text(captions)
    page.locator("#draw-pictures .card").nth(1).click()
    drawn = saved(page, "draw")
    with page.expect_download() as download:
        page.click("#draw-details a:has-text('Save PNG')")
    assert download.value.suggested_filename == "a-bee-medium-dark-1.png"
    # Another prompt for what is painted over: all else is the original to the bit.
    page.click("#draw-details button:has-text('Edit')")
    edit = page.locator("#edit-asks textarea")
    expect(edit).to_have_value(EXAMPLES[1])
    edit.fill("a red ant")
    paint(page, (0, 0), (3, 0), (3, 1), (0, 1), grid=4)
    painted(page, 8, of=16)
    page.uncheck("#soft")
    draw(page, "edit")
    inside = np.zeros((16, 16), dtype=bool)
    inside[:, :8] = True
    variant = saved(page, "edit")
    assert np.array_equal(variant[~inside], drawn[~inside])
    assert not np.array_equal(variant[inside], drawn[inside])
    code = page.locator("#edit-details pre").inner_text()
    assert "--prompt 'a red ant'" in code
    assert "--known known.png --mask mask.png" in code
    page.click("#vary-unsure")
    painted(page, 6, of=16)
    # Compare takes prompts, and a saved picture brings its own back.
    page.click("#tab-compare")
    page.fill("#compare-asks textarea", "bee\nant")
    expect(page.locator("#table .card")).to_have_count(6)
    draw(page, "compare")
    page.locator("#table .card").nth(1).click()
    assert page.locator("#compare-details b").inner_text() == "ant · 1"
    drop(page, download.value.path(), "bee.png")
    expect(notice(page)).to_have_text("settings restored from bee.png: Draw makes it again")
    expect(field).to_have_value(EXAMPLES[1])
    draw(page)
    assert np.array_equal(saved(page, "draw"), drawn)


def test_prompt_on_a_phone_is_completed_without_covering_the_pictures(opener: Opener, worded: Path) -> None:
    page = opener(390, 844, has_touch=True, is_mobile=True, device_scale_factor=2)
    field = choose_words(page, worded)
    field.fill("")
    page.keyboard.type("be")
    listed = page.locator("#draw-asks [role=listbox]").bounding_box()
    pictures = page.locator("#draw-pictures").bounding_box()
    assert listed is not None
    assert pictures is not None
    assert listed["y"] >= pictures["y"] + pictures["height"]
    page.locator("#draw-asks [role=option]").nth(1).tap()
    expect(field).to_have_value("beetle")
    field.fill("a-word-that-is-longer-than-any-line-on-a-phone-and-has-no-place-to-break bee")
    page.keyboard.press("Enter")
    finish(page, "draw")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


CONTRASTS = """
() => {
  const pixel = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = pixel.getContext("2d", { willReadFrequently: true });
  const over = (below, color) => {
    context.fillStyle = `rgb(${below.join(" ")})`;
    context.fillRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const background = (element) => element
    ? over(background(element.parentElement), getComputedStyle(element).backgroundColor) : [255, 255, 255];
  const luminance = (color) => {
    const linear = (value) => (value <= 0.04 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = color.map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.body.querySelectorAll("*")].flatMap((element) => {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
    if (!text || !element.checkVisibility() || element.closest(":disabled, option")) return [];
    const below = background(element);
    const [a, b] = [luminance(over(below, getComputedStyle(element).color)), luminance(below)];
    return [[text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]];
  });
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_either_theme_has_legible_text(opener: Opener, scheme: Any) -> None:
    page = opener(color_scheme=scheme)
    page.click("[name=preset][value=fast]")
    draw(page)

    def legible(count: int) -> None:
        contrasts: list[tuple[str, float]] = page.evaluate(CONTRASTS)
        assert len(contrasts) >= count
        assert [each for each in contrasts if each[1] < 4.5] == []

    def dark() -> bool:
        return page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"

    page.click("#more summary")
    legible(30)
    page.click("#draw-details button:has-text('Edit')")
    page.click("#edit-go")
    expect(notice(page)).to_contain_text("nothing is painted")
    legible(25)
    page.click("#tab-compare")
    legible(15)
    assert dark() == (scheme == "dark")
    page.click("#theme")
    assert dark() != (scheme == "dark")
    legible(15)
