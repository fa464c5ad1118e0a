"""The studio as a service: a real `mar app`, and clients that use it, crowd it and attack it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import http.server
import json
import os
import re
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from processes import free_port

import mar
from mar import cli
from mar.app.queueing import MAX_QUEUE, MAX_UNREAD
from mar.app.studio import MAX_IMAGES

pytest.importorskip("gradio_client", reason="the studio needs gradio: pip install '.[app]'")
ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120.0
"""After this time a test fails: far more than a busy machine needs."""
LONG = {"diffusion_steps": 1000, "steps": 49}
"""Settings of a request that takes minutes, for 16 pictures, and a second or two for each step."""
NOBODY = "http://127.0.0.1:9"
"""Address of a proxy that does not answer."""
CANARY = "the-canary-of-a-file-outside"


# ---- a server and a plain client


class Failed(Exception):
    """The studio's answer to a request that it does not fulfil: an HTTP status, or "error", and a line."""

    def __init__(self, status: int | str, line: str) -> None:
        super().__init__(f"{status}: {line}")
        self.status, self.line = status, line


@dataclass
class Served:
    """A server in a process of its own, whose files are all below `folder`."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path

    def said(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def http(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def post(self, name: str, *data: Any) -> str:
        """Call a function; returns its event."""
        status, _, body = self.http("POST", f"/gradio_api/call/{name}", json.dumps({"data": data}).encode(), JSON)
        answer = json.loads(body)
        if status != 200:
            raise Failed(status, answer.get("error") or answer["detail"])
        return str(answer["event_id"])

    def events(self, name: str, event: str) -> Iterator[Any]:
        """Yield what a call yields."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request("GET", f"/gradio_api/call/{name}/{event}")
            answer = connection.getresponse()
            if answer.status != 200:
                raise Failed(answer.status, json.loads(answer.read())["error"])
            kind = ""
            for line in answer:
                if line.startswith(b"event: "):
                    kind = line[7:].decode().strip()
                elif line.startswith(b"data: ") and kind != "heartbeat":
                    data = json.loads(line[6:])
                    if kind == "error":
                        raise Failed("error", data["error"] if isinstance(data, dict) else str(data))
                    yield data[0]

    def call(self, name: str, *data: Any) -> Any:
        """Call a function; returns its result."""
        *_, last = self.events(name, self.post(name, *data))
        return last

    def draw(self, *data: Any) -> list[Image.Image]:
        return [decoded(picture["image"]) for picture in self.call("draw", *data)["images"]]

    def begin_long_draw(self, ticket: str) -> Iterator[Any]:
        """Begin to draw what takes minutes; returns its events after the first one."""
        number = MAX_IMAGES
        events = self.events(
            "draw",
            self.post("draw", "fashion", [0] * number, list(range(number)), "exact", LONG, None, None, 1, ticket),
        )
        next(events)
        return events

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(WAIT_S)


@contextlib.contextmanager
def serve(folder: Path, port: int, command: list[str]) -> Iterator[Served]:
    """Run a server until the end; what it says goes to the file `output`."""
    for name in ("cwd", "home", "tmp", "gradio", "user"):
        (folder / name).mkdir(parents=True)
    environment = {
        **os.environ, "MAR_HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"),
        "GRADIO_TEMP_DIR": str(folder / "gradio"), "HOME": str(folder / "user"), "PYTHONPATH": str(ROOT / "src"),
        "PYTHONDONTWRITEBYTECODE": "1", "http_proxy": NOBODY, "all_proxy": NOBODY,
    }  # fmt: skip
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=folder / "cwd")
    served = Served(process, port, folder)
    try:
        deadline = time.monotonic() + WAIT_S
        while f"127.0.0.1:{port}" not in served.said() and not answers(port):
            assert process.poll() is None, served.said()
            assert time.monotonic() < deadline, served.said()
            time.sleep(0.05)
        yield served
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    return False


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port = free_port()
    command = [sys.executable, "-m", "mar", "app", "--no-browser", "--device", "cpu", "--port", str(port)]
    with serve(tmp_path_factory.mktemp("studio") / "served", port, command) as served:
        yield served
        assert served.draw("fashion", ["bag"], [3], "fast", QUICK) == [quick("bag", 3)]  # after all of it


@pytest.fixture
def studio(shared: Served) -> Iterator[Served]:
    """The module's server, which has to be alive after each test, and without a traceback in its log."""
    before = len(shared.said())
    yield shared
    assert shared.process.poll() is None
    said = shared.said()[before:]
    assert "Traceback" not in said, said


# ---- pictures


QUICK = {"steps": 4}


@cache
def model() -> Any:
    return mar.load("fashion", device="cpu")


@cache
def quick(label: str | int, seed: int) -> Image.Image:
    """The picture of `sample` with the settings of QUICK."""
    [image] = model().sample([label], [seed], preset="fast", **QUICK)
    return image


def decoded(url: str) -> Image.Image:
    image = Image.open(BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    image.load()
    return Image.fromarray(np.asarray(image))  # without its settings


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def url_of(content: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(content).decode()


def noise(width: int = 28, height: int = 28, channels: int = 1) -> Image.Image:
    values = np.random.default_rng(5).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


def half_mask(side: int = 28) -> Image.Image:
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).rectangle((0, 0, side // 2, side), fill=255)
    return mask


@pytest.mark.parametrize(
    ("label", "seed", "preset", "settings", "options"),
    [
        pytest.param("dress", 0, "fast", None, {}, id="name"),
        pytest.param(3, 0, "fast", {}, {}, id="number"),
        pytest.param(None, 2**63 - 1, "fast", {"steps": 5}, {}, id="no-class-and-largest-seed"),
        pytest.param("Ankle boot", 7, "balanced", None, {}, id="balanced"),
        pytest.param("bag", 8, None, {"steps": 6, "diffusion_steps": 10, "guidance_scale": 2.5}, {}, id="own-settings"),
        pytest.param(
            9, 1, "exact", {"steps": 3, "temperature": 0.9, "guidance_interval": [0.2, 0.8], "x0_bound": None}, {},
            id="settings-of-all-kinds",
        ),
        pytest.param("bag", 2, "fast", {"steps": 10**9}, {}, id="more-steps-than-tokens"),
        pytest.param("coat", 4, "fast", None, {"known": noise(), "mask": half_mask()}, id="edit"),
        pytest.param(
            None, 5, "fast", {"steps": 3}, {"known": noise(90, 90, 3), "mask": half_mask(90), "grow": 0},
            id="edit-of-a-larger-picture",
        ),
    ],
)  # fmt: skip
def test_draw_of_one_picture_equals_sample(
    studio: Served, label: Any, seed: int, preset: str | None, settings: dict[str, Any] | None, options: dict[str, Any]
) -> None:
    urls = [None if (image := options.get(name)) is None else url_of(encoded(image)) for name in ("known", "mask")]
    drawn = studio.draw("fashion", [label], [seed], preset, settings, *urls, options.get("grow", 1))
    python = {name: tuple(value) if isinstance(value, list) else value for name, value in (settings or {}).items()}
    lists = {name: [value] if isinstance(value, Image.Image) else value for name, value in options.items()}
    assert drawn == model().sample([label], [seed], preset=preset, **python, **lists)


def test_python_example_of_the_docs_writes_the_pictures(studio: Served, tmp_path: Path) -> None:
    page = (ROOT / "docs/studio.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "gradio_client" in block]
    assert code.count("http://127.0.0.1:7860") == 1
    script = tmp_path / "example.py"
    script.write_text(code.replace("127.0.0.1:7860", f"127.0.0.1:{studio.port}"))
    with contextlib.chdir(tmp_path):
        runpy.run_path(str(script))
    for label, seed in (("dress", 0), (3, 1)):
        [expected] = model().sample([label], [seed], preset="fast")
        drawn = np.asarray(Image.open(tmp_path / f"{seed}.png"), dtype=int)
        assert np.abs(drawn - np.asarray(expected, dtype=int)).max() <= 1  # two in a batch: sums round differently


# ---- a crowd


def resident_mebibytes(process: int) -> float:
    """Memory of a process and its children."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = {process}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    pages = [int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in family]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_crowd_of_100_requests_is_answered_with_32_pictures_or_busy(studio: Served) -> None:
    for seed in range(9):
        assert studio.draw("fashion", [seed], [seed], "fast", QUICK) == [quick(seed, seed)]
    large = studio.begin_long_draw("large")  # of as many pictures as the one that blocks the others
    studio.call("stop", "large")
    *_, _last = large
    before = resident_mebibytes(studio.process.pid)
    blocker = studio.begin_long_draw("blocker")  # so that the others wait
    together = threading.Barrier(20)
    posted = threading.Barrier(20, action=lambda: studio.call("stop", "blocker"))

    def client(number: int) -> Counter[str]:
        together.wait(WAIT_S)
        events, seen = [], Counter[str]()
        for seed in range(5):
            try:
                events.append((seed, studio.post("draw", "fashion", [number % 10], [seed], "fast", QUICK)))
            except Failed as failed:
                seen[f"{failed}"] += 1
        posted.wait(WAIT_S)
        for seed, event in events:
            *_, last = studio.events("draw", event)
            assert [decoded(picture["image"]) for picture in last["images"]] == [quick(number % 10, seed)]
            seen["drawn"] += 1
        return seen

    with ThreadPoolExecutor(20) as clients:
        total = sum(clients.map(client, range(20)), Counter[str]())
    busy = f"503: busy: {MAX_QUEUE} requests wait; try again in a moment"
    assert total == {"drawn": MAX_QUEUE, busy: 100 - MAX_QUEUE}
    *_, last = blocker
    assert last["stopped"]
    assert resident_mebibytes(studio.process.pid) - before < 100


def test_crowd_of_gradio_clients_is_answered_each_with_its_own_pictures_or_busy(studio: Served) -> None:
    from gradio_client import Client

    clients = [Client(f"http://127.0.0.1:{studio.port}", verbose=False) for _ in range(3)]
    blocker = studio.begin_long_draw("gradio-blocker")
    jobs = [
        (seed, client.submit("fashion", ["bag"], [seed], "fast", QUICK, api_name="/draw"))
        for seed in range(12)
        for client in clients
    ]
    while sum(job.done() for _, job in jobs) < len(jobs) - MAX_QUEUE:  # those that were refused
        time.sleep(0.02)
    studio.call("stop", "gradio-blocker")
    *_, _last = blocker
    drawn = busy = 0
    for seed, job in jobs:
        error = job.exception(WAIT_S)
        if error is None:
            drawn += 1
            assert [decoded(picture["image"]) for picture in job.result()["images"]] == [quick("bag", seed)]
        else:
            busy += 1
            assert "Queue is full" in str(error)
    assert (drawn, busy) == (MAX_QUEUE, len(jobs) - MAX_QUEUE)
    for client in clients:
        client.close()


def test_draw_of_a_client_that_goes_away_is_stopped(studio: Served) -> None:
    running = studio.begin_long_draw("")
    waiting = studio.post("draw", "fashion", [0] * MAX_IMAGES, list(range(MAX_IMAGES)), "exact", LONG)
    with socket.create_connection(("127.0.0.1", studio.port), WAIT_S) as connection:
        connection.sendall(f"GET /gradio_api/call/draw/{waiting} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    step = next(running)
    left = step["seconds"] / step["step"] * (step["steps"] - step["step"])
    running.close()  # type: ignore[attr-defined]
    started = time.monotonic()
    studio.draw("fashion", ["bag"], [3], "fast", QUICK)
    assert time.monotonic() - started < left / 4


def test_calls_whose_streams_nobody_reads_are_dropped_beyond_a_bound(studio: Served) -> None:
    first = studio.post("draw", "fashion", [0] * MAX_IMAGES, list(range(MAX_IMAGES)), "exact", LONG)
    for _ in range(MAX_UNREAD):
        last = studio.post("models")
    with pytest.raises(Failed, match="404: there are no such events"):
        next(studio.events("draw", first))
    assert next(studio.events("models", last))["models"]
    studio.draw("fashion", ["bag"], [3], "fast", QUICK)  # the first one was stopped


# ---- stop


def test_stop_ends_a_running_draw_within_a_step(studio: Served) -> None:
    events = studio.begin_long_draw("running")
    assert studio.call("stop", "running")
    *_, last = events
    assert (last["kind"], last["stopped"], len(last["images"])) == ("done", True, MAX_IMAGES)
    assert last["step"] < last["steps"]


def test_stop_ends_a_waiting_draw_and_no_other(studio: Served) -> None:
    running = studio.begin_long_draw("first")
    waiting = studio.post("draw", "fashion", ["bag"], [1], "fast", QUICK, None, None, 1, "second")
    other = studio.post("draw", "fashion", ["bag"], [2], "fast", QUICK, None, None, 1, "third")
    for ticket in ("second", "unknown", "fir", "first ", "FIRST"):
        assert studio.call("stop", ticket)
    assert next(running)["kind"] == "step"
    studio.call("stop", "first")
    *_, last = running
    assert last["stopped"]
    *_, last = studio.events("draw", waiting)
    assert (last["kind"], last["stopped"], last["images"]) == ("done", True, [])
    *_, last = studio.events("draw", other)
    assert not last["stopped"]


@pytest.mark.parametrize("ticket", ["", "x" * 101, None, 5, ["first"], {}, True])
def test_stop_with_a_wrong_ticket_says_so(studio: Served, ticket: Any) -> None:
    with pytest.raises(Failed, match=r"^error: ticket: got .*, expected "):
        studio.call("stop", ticket)


# ---- hostile calls


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rest = b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + rest


def png_with(text: str, **options: Any) -> bytes:
    """A picture that says of itself what it was drawn with."""
    info = PngInfo()
    info.add_text("mar", text, **options)
    return encoded(noise(), pnginfo=info)


@cache
def zeros() -> bytes:
    return zlib.compress(bytes(50 * 2**20), 1)


def turned() -> tuple[bytes, Image.Image]:
    """A JPEG lying on its side by its EXIF, and how it is upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise().resize((56, 84)), "JPEG", exif=exif), noise().resize((56, 84)).rotate(-90, expand=True)


BAD_PICTURES: dict[str, Callable[[], Any]] = {
    "bomb of 50000x50000": lambda: url_of(png(50000, 50000)),
    "bomb beyond 40 million pixels": lambda: url_of(png(8000, 8000, pixels=bytes(8001 * 8000))),
    "bomb of text": lambda: url_of(png(1, 1, chunk(b"zTXt", b"mar\0\0" + zeros()), pixels=b"\0\0")),
    "bomb of international text": lambda: url_of(png(1, 1, chunk(b"iTXt", b"mar\0\1\0\0\0" + zeros()), pixels=b"\0\0")),
    "bomb of color profile": lambda: url_of(png(1, 1, chunk(b"iCCP", b"x\0\0" + zeros()), pixels=b"\0\0")),
    "sides of 500:1": lambda: url_of(encoded(Image.new("L", (500, 1)))),
    "sides of 1:30000": lambda: url_of(encoded(Image.new("L", (1, 30000)))),
    "SVG": lambda: url_of(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "HTML": lambda: url_of(b"<html><script>alert(1)</script></html>"),
    "PDF": lambda: url_of(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"),
    "PostScript": lambda: url_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"),
    "ZIP": lambda: url_of(b"PK\x03\x04" + bytes(60)),
    "nothing": lambda: url_of(b""),
    "truncated PNG": lambda: url_of(encoded(noise())[:300]),
    "truncated JPEG": lambda: url_of(encoded(noise(90, 90), "JPEG")[:400]),
    "truncated header": lambda: url_of(encoded(noise())[:20]),
    "damaged PNG": lambda: url_of(encoded(noise())[:60] + bytes(200) + encoded(noise())[260:]),
    "CIELAB": lambda: url_of(encoded(noise(channels=3).convert("LAB"), "TIFF")),
    "more than 10 MiB": lambda: url_of(bytes(11 * 2**20)),
    "no base64": lambda: "data:image/png;base64,<script>",
    "base64 cut": lambda: url_of(encoded(noise()))[:-3],
    "data URL in percent encoding": lambda: "data:image/png,%89PNG",
    "data URL without content": lambda: "data:",
    "path": lambda: "/etc/passwd",
    "path of a picture": lambda: str(ROOT / "docs/images/demo.png"),
    "file URL": lambda: "file:///etc/passwd",
    "HTTP URL": lambda: f"http://127.0.0.1:{CANARY_PORT}/picture.png",
    "null": lambda: None,
    "number": lambda: 7,
    "list": lambda: ["data:image/png;base64,"],
    "bytes of gradio's Base64": lambda: {"data": "data:image/png;base64,", "name": "/etc/passwd", "is_file": True},
}


@pytest.fixture(scope="module")
def canary() -> Iterator[list[Any]]:
    """Lists who connects to CANARY_PORT: nobody may."""
    seen: list[Any] = []
    with socket.create_server(("127.0.0.1", CANARY_PORT)) as listener:

        def watch() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, address = listener.accept()
                    seen.append(address)
                    connection.close()

        threading.Thread(target=watch, daemon=True).start()
        yield seen


CANARY_PORT = free_port()


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_open_and_draw_with_a_bad_picture_say_so_in_one_line(studio: Served, canary: list[Any], name: str) -> None:
    picture = BAD_PICTURES[name]()
    mask = url_of(encoded(half_mask()))
    for call in (("open", "fashion", picture), ("draw", "fashion", ["bag"], [0], "fast", QUICK, picture, mask)):
        with pytest.raises(Failed) as failed:
            studio.call(*call)
        assert failed.value.status in ("error", 400)
        assert 10 < len(failed.value.line) < 620
        assert re.search(r"picture|known|got", failed.value.line)
        assert "\n" not in failed.value.line
    assert not canary


def test_files_in_gradio_s_way_are_neither_read_nor_fetched(studio: Served, canary: list[Any]) -> None:
    secret = studio.folder / "cwd" / "secret.png"
    secret.write_bytes(png_with(CANARY))
    uploads = studio.folder / "gradio" / "upload.png"
    uploads.write_bytes(secret.read_bytes())
    try:
        for path in (str(secret), str(uploads), "secret.png", f"http://127.0.0.1:{CANARY_PORT}/x.png"):
            file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
            for data in (file, [file], {"steps": file}, [[file]], {"a": [file]}):
                for call in (
                    ("open", "fashion", data), ("draw", "fashion", ["bag"], [0], "fast", data),
                    ("draw", "fashion", data, [0]), ("draw", data, ["bag"], [0]), ("stop", data),
                ):  # fmt: skip
                    with pytest.raises(Failed, match="400: data: expected texts, numbers, lists and settings"):
                        studio.call(*call)
        assert not canary
        assert CANARY not in studio.said()
        assert [path for path in (studio.folder / "gradio").rglob("*") if path.is_file()] == [uploads]
    finally:
        secret.unlink()
        uploads.unlink()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(lambda: encoded(noise(1, 1)), None, id="1x1"),
        pytest.param(lambda: encoded(noise(40, 1)), None, id="40x1"),
        pytest.param(lambda: encoded(Image.new("L", (6000, 6000), 9)), Image.new("L", (28, 28), 9), id="36-megapixels"),
        pytest.param(lambda: encoded(noise(channels=3).convert("CMYK"), "JPEG"), None, id="CMYK-JPEG"),
        pytest.param(
            lambda: encoded(Image.fromarray(np.asarray(noise()).astype(np.uint16) * 257)), noise(), id="16-bit-PNG"
        ),
        pytest.param(
            lambda: encoded(Image.new("P", (28, 28)), transparency=0), Image.new("L", (28, 28), 255),
            id="palette-with-transparency",
        ),
        pytest.param(
            lambda: encoded(noise(), "GIF", save_all=True, append_images=[Image.new("L", (28, 28), 5)] * 9), noise(),
            id="animated-GIF-is-its-first-picture",
        ),
        pytest.param(lambda: encoded(noise(), "WEBP", lossless=True), noise(), id="WebP"),
        pytest.param(lambda: encoded(noise(), "BMP"), noise(), id="BMP"),
        pytest.param(lambda: encoded(noise(), "TIFF"), noise(), id="TIFF"),
        pytest.param(
            lambda: encoded(noise(), exif=b"Exif\0\0MM\xff*\0\0\0\x08" + b"\xff" * 40), noise(), id="damaged-EXIF"
        ),
    ],
)  # fmt: skip
def test_open_of_an_odd_picture_gives_it_in_the_model_s_size(
    studio: Served, content: Callable[[], bytes], expected: Image.Image | None
) -> None:
    opened = studio.call("open", "fashion", url_of(content()))
    assert opened["restored"] is None
    assert decoded(opened["image"]).size == (28, 28)
    if expected is not None:
        assert decoded(opened["image"]) == expected


def test_open_turns_a_picture_upright_by_its_exif(studio: Served) -> None:
    content, upright = turned()
    as_sent = studio.call("open", "fashion", url_of(content))["image"]
    as_turned = studio.call("open", "fashion", url_of(encoded(upright)))["image"]
    difference = np.asarray(decoded(as_sent), dtype=int) - np.asarray(decoded(as_turned), dtype=int)
    assert np.abs(difference).mean() < 4  # JPEG's loss
    assert decoded(as_turned) != decoded(studio.call("open", "fashion", url_of(encoded(upright.rotate(90))))["image"])


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "[]", "7", "[" * 100_000, '{"steps":' * 30_000, '{"steps": NaN}', '{"steps": 1e400}',
        '{"steps": 1' + "0" * 4000 + "}", '{"steps": "7"}', '{"steps": true}', '{"steps": {"a": []}}', '{"seed": -1}',
        '{"seed": 1' + "0" * 400 + ', "label": 99}', '{"label": true, "seed": true, "model": {"a": 1}}',
        '{"model": "' + "m" * 900_000 + '"}', '{"model": "\\ud800"}', '{"model": "../../etc/passwd"}',
        '{"__class__": "x", "__init__": null}', '{"guidance_interval": [1, 2, 3]}', '{"order": "\\u0000"}',
        '{"temperature": -Infinity, "solver": "nosuch"}',
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_open_of_a_png_with_hostile_settings_restores_none_or_harmless_ones(studio: Served, text: str) -> None:
    opened = studio.call("open", "fashion", url_of(png_with(text, zip=len(text) > 5000)))
    assert decoded(opened["image"]) == noise()
    restored = opened["restored"]
    if restored is not None:
        assert len(restored["model"]) <= 200
        assert restored["label"] is None
        assert restored["seed"] == 0
        assert restored["settings"] == {}
    assert len(opened["note"]) < 500


def argument(**changes: Any) -> list[Any]:
    """Arguments of a draw that are right but for `changes`."""
    names = {"model": "fashion", "labels": ["bag"], "seeds": [0], "preset": "fast", "settings": QUICK}
    return list({**names, "known": None, "mask": None, "grow": 1, "ticket": "", **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [
        *({"settings": {"steps": value}} for value in (10**12, 0, -1, 1.5, "7", True, [], 10**400, 1e308, -(10**400))),
        {"settings": {"diffusion_steps": 10**9}},
        {"settings": {"diffusion_steps": 0}},
        {"settings": {"guidance_scale": "high"}},
        {"settings": {"temperature": float("nan")}},
        {"settings": {"temperature": float("inf")}},
        {"settings": {"guidance_interval": [0.1]}},
        {"settings": {"guidance_interval": [2, 1]}},
        {"settings": {"solver": "__import__('os')"}},
        {"settings": {"nosuch": 1}},
        {"settings": {"__class__": "x"}},
        {"settings": {"preset": "fast", "labels": []}},
        {"settings": {"allow_broken": True}},
        {"settings": {"x" * 10**6: 1}},
        {"settings": "fast"},
        {"settings": [["steps", 3]]},
        {"labels": ["x" * 10**6]},
        {"labels": ["nosuch"]},
        {"labels": [10]},
        {"labels": [-2]},
        {"labels": [1.5]},
        {"labels": [True]},
        {"labels": "bag"},
        {"labels": []},
        {"labels": ["bag"] * 1000, "seeds": [0] * 1000},
        {"labels": ["bag", "bag"]},
        {"labels": None},
        {"prompts": ["a bag"]},
        {"labels": None, "prompts": ["a bag"]},
        {"labels": None, "prompts": ["x" * 10**6]},
        {"labels": None, "prompts": ["a bag"] * 1000, "seeds": [0] * 1000},
        {"labels": None, "prompts": "a bag"},
        *({"seeds": [value]} for value in (2**64, 2**63, -1, "0", 0.5, None, True)),
        *({"seeds": value} for value in (None, 0, "0", [], [0, 1])),
        {"preset": "nosuch"},
        {"preset": ["fast"]},
        {"preset": 5},
        {"grow": -1},
        {"grow": 10**9},
        {"grow": "1"},
        {"grow": None},
        {"ticket": 5},
        {"model": "m" * 10**6},
        *({"model": value} for value in ("../../etc/passwd", "/etc/passwd", "fashion/../fashion", "", None, 7, True)),
        {"model": str(ROOT / "src/mar/assets/fashion.safetensors")},
        {"model": "owner/name"},
        {"model": "mar-base"},
        {"known": url_of(encoded(noise()))},
        {"mask": url_of(encoded(half_mask()))},
        {"known": url_of(encoded(noise())), "mask": url_of(encoded(half_mask(14)))},
    ],
    ids=lambda changes: " ".join(f"{name}={str(value)[:30]}" for name, value in changes.items()) or "none",
)  # fmt: skip
def test_draw_with_a_wrong_argument_says_so_in_one_line(studio: Served, changes: dict[str, Any]) -> None:
    with pytest.raises(Failed) as failed:
        studio.call("draw", *argument(**changes))
    assert failed.value.status in ("error", 400)
    assert 10 < len(failed.value.line) <= 600
    assert re.search(r"got|expect|but|not|range", failed.value.line)
    assert "failed in the studio" not in failed.value.line  # that is said of our own mistakes
    assert "\n" not in failed.value.line


@pytest.mark.parametrize("function", ["open", "confidence", "load", "download", "check"])
@pytest.mark.parametrize("name", ["../../etc/passwd", "owner/name", "", 5, None, ["fashion"]])
def test_functions_with_a_model_beyond_the_catalog_refuse_it(studio: Served, function: str, name: Any) -> None:
    picture = url_of(encoded(noise()))
    rest = {"open": [picture], "confidence": ["bag", picture], "check": [["bag"]]}.get(function, [])
    with pytest.raises(Failed, match=r"^error: model: got .*, expected one of emoji, fashion, mar-base"):
        studio.call(function, name, *rest)


# ---- hostile HTTP


JSON = {"content-type": "application/json"}
CALL = "/gradio_api/call/models"
HEAD = "HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/file=/etc/passwd"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=secret.png"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/static/../studio.py"),
        ("GET", "/static/..%2fstudio.py"),
        ("GET", "/static/%2e%2e/studio.py"),
        ("GET", "/static/studio.py"),
        ("GET", "/static//etc/passwd"),
        ("GET", "/static/"),
        ("GET", "/assets/index.js"),
        ("GET", "/proxy=http://127.0.0.1/"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("GET", "/theme.css"),
        ("GET", "/robots.txt"),
        ("GET", "/manifest.json"),
        ("GET", "/monitoring"),
        ("GET", "/monitoring/summary"),
        ("GET", "/docs"),
        ("GET", "/redoc"),
        ("GET", "/openapi.json"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/login"),
        ("GET", "/token"),
        ("GET", "/gradio_api/upload_progress?upload_id=x"),
        ("GET", "/gradio_api/stream/x/y/z/playlist.m3u8"),
        ("GET", "/gradio_api/mcp/sse"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/call/draw/nosuch"),
        ("GET", "/gradio_api/call/draw/" + "x" * 5000),
        ("GET", "/gradio_api/call/../../etc/passwd"),
        ("GET", "/gradio_api/queue/data"),
        ("GET", "/gradio_api/queue/data?session_hash=guessed"),
        ("GET", "/gradio_api/queue/data?session_hash[]=x&" + "a=b&" * 1000),
        ("GET", "/%00"),
        ("GET", "/" + "x" * 20_000),
        ("POST", "/"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/upload"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/run/draw"),
        ("POST", "/run/predict"),
        ("POST", "/api/predict"),
        ("POST", "/gradio_api/api/draw"),
        ("POST", "/gradio_api/call/v2/draw"),
        ("POST", "/gradio_api/call/nosuch"),
        ("POST", "/gradio_api/call/__init__"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("PUT", CALL),
        ("DELETE", CALL),
        ("PATCH", "/"),
        ("OPTIONS", CALL),
        ("TRACE", "/"),
        ("CONNECT", "/"),
    ],
)
def test_http_beyond_the_studio_is_refused(studio: Served, method: str, path: str) -> None:
    status, headers, body = studio.http(method, path, b'{"data": []}' if method == "POST" else None, JSON)
    assert status in (400, 404, 405)
    assert len(body) < 300
    assert "root:" not in body.decode()
    assert "etag" not in headers


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CALL, b"", 400),
        (CALL, b"{", 400),
        (CALL, b"[]", 400),
        (CALL, b"null", 400),
        (CALL, b"\xff\xfe", 400),
        (CALL, b'{"data": ["\\ud800"]}', 400),
        (CALL, b'{"data": {}}', 400),
        (CALL, b'{"data": [1]}', 400),
        (CALL, b'{"data": ' + b"[" * 4000 + b"]" * 4000 + b"}", 400),
        (CALL, b'{"data": ' + b"[" * 10**6, 400),
        (CALL, b'{"data": [' + b"{}," * 10**6 + b"{}]}", 400),
        (CALL, b'{"data": [1' + b"0" * 5000 + b"]}", 400),
        (CALL, b"x" * (33 * 2**20), 413),
        ("/gradio_api/call/draw", b'{"data": ["fashion", ["bag"]]}', 400),
        ("/gradio_api/call/draw", b'{"data": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}', 400),
        ("/gradio_api/queue/join", b"{}", 404),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": 2}', 400),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": 99, "session_hash": "x"}', 404),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": -1, "session_hash": "x"}', 404),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": "2", "session_hash": "x"}', 404),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": true, "session_hash": "x"}', 404),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": 2, "session_hash": {"a": 1}}', 400),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": 2, "session_hash": "../x"}', 400),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": 2, "session_hash": "' + b"x" * 10**6 + b'"}', 400),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": 2, "session_hash": "odd", "trigger_id": "x"}', 200),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": 2, "session_hash": "odd", "trigger_id": 99}', 200),
        ("/gradio_api/queue/join", b'{"data": [], "fn_index": 2, "session_hash": "odd", "event_data": [[]]}', 200),
        ("/gradio_api/cancel", b"{}", 422),
        ("/gradio_api/cancel", b'{"session_hash": "x", "fn_index": 0, "event_id": "nosuch"}', 200),
        ("/gradio_api/cancel", b'{"session_hash": "x", "fn_index": "a", "event_id": {}}', 422),
        ("/gradio_api/reset", b'{"event_id": "x"}', 200),
    ],
    ids=lambda value: str(value)[:60],
)
def test_http_body_that_is_no_call_is_refused(studio: Served, path: str, body: bytes, status: int) -> None:
    got, _, answer = studio.http("POST", path, body, JSON)
    assert (got, len(answer) < 1500) == (status, True), answer[:300]
    if got in (400, 404, 413):
        assert json.loads(answer)["error"]
    if b"odd" in body:
        _, _, stream = studio.http("GET", "/gradio_api/queue/data?session_hash=odd")
        assert b'"success":true' in stream


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "example.com"}, 403),
        ({"host": "127.0.0.1.example.com"}, 403),
        ({"host": "127.0.0.1@example.com"}, 403),
        ({"host": "0.0.0.0"}, 403),
        ({"host": ""}, 403),
        ({"host": "["}, 403),
        ({"host": "localhost:99999"}, 200),
        ({"host": "[::1]"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "127.0.0.1", "origin": "http://127.0.0.1"}, 200),
        ({"host": "127.0.0.1:1", "origin": "http://127.0.0.1:2"}, 403),
        ({"host": "127.0.0.1", "origin": "https://example.com"}, 403),
        ({"host": "127.0.0.1", "origin": "null"}, 403),
        ({"host": "127.0.0.1", "origin": ""}, 403),
        ({"host": "127.0.0.1", "origin": "http://[::1"}, 403),
        ({"host": "127.0.0.1", "origin": "http://127.0.0.1@example.com"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_http_of_another_host_or_site_is_refused(
    studio: Served, method: str, headers: dict[str, str], status: int
) -> None:
    got, _, _ = studio.http(method, "/" if method == "GET" else CALL, b'{"data": []}', {**JSON, **headers})
    assert got == status


def test_http_page_forbids_requests_to_elsewhere(studio: Served) -> None:
    status, headers, _ = studio.http("GET", "/")
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert studio.http("HEAD", "/")[0] == 200
    _, _, config = studio.http("GET", "/config")
    assert str(studio.folder) not in config.decode()
    assert str(ROOT) not in config.decode()


@pytest.mark.parametrize(
    "request_text",
    [
        f"POST {CALL} {HEAD}Content-Length: -5\r\n\r\n",
        f"POST {CALL} {HEAD}Content-Length: 99999999999999999999\r\n\r\n",
        f"POST {CALL} {HEAD}Content-Length: 5\r\n\r\n{{",
        f"POST {CALL} {HEAD}Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        f"POST {CALL} {HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n{{",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00",
        "GET /gradio_api/heartbeat/x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + "x" * 70_000 + "\r\n\r\n",
    ],
    ids=lambda text: repr(text[:60]),
)
def test_http_that_is_broken_off_harms_nobody(studio: Served, request_text: str) -> None:
    with socket.create_connection(("127.0.0.1", studio.port), WAIT_S) as connection:
        connection.sendall(request_text.encode("latin-1"))
        connection.settimeout(0.2)
        with contextlib.suppress(OSError):
            answer = connection.recv(65536)
            assert b"Traceback" not in answer
            assert re.match(rb"HTTP/1.1 (200|400|403|413|426)|$", answer)


def test_http_body_without_a_length_is_bounded_too(studio: Served) -> None:
    with socket.create_connection(("127.0.0.1", studio.port), WAIT_S) as connection:
        connection.sendall(f"POST {CALL} {HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        part = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
        with contextlib.suppress(OSError):  # it may hang up before the end
            for _ in range(34):
                connection.sendall(part)
        assert b" 413 " in connection.recv(65536).partition(b"\r\n")[0]


def test_http_bodies_that_arrive_slowly_block_nobody_and_are_bounded_together(studio: Served) -> None:
    head = f"POST {CALL} {HEAD}Content-Length: {31 * 2**20}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(6):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", studio.port), WAIT_S))
            with contextlib.suppress(ConnectionError):  # it is refused, which may cut the connection
                connection.sendall(head + bytes(30 * 2**20))
            connections.append(connection)
        assert studio.draw("fashion", ["bag"], [3], "fast", QUICK) == [quick("bag", 3)]
        readable, _, _ = select.select(connections, [], [], WAIT_S / 2)
        assert 0 < len(readable) < 4  # 6 times 30 MiB are more than 128 MiB, 3 times are not
        for connection in readable:
            with contextlib.suppress(ConnectionError):
                assert connection.recv(100).startswith((b"HTTP/1.1 503", b""))


# ---- nobody else's, and nothing on the disk


def test_pictures_of_a_client_are_read_once_and_by_nobody_else(studio: Served) -> None:
    event = studio.post("draw", "fashion", ["bag"], [5], "fast", QUICK)
    *_, last = studio.events("draw", event)
    assert decoded(last["images"][0]["image"]) == quick("bag", 5)
    for path in (f"call/draw/{event}", f"call/models/{event}", f"queue/data?session_hash={event}"):
        status, _, body = studio.http("GET", f"/gradio_api/{path}")
        assert (status, b"image" in body) == (404, False)
    assert len(event) >= 32  # it can't be guessed
    body = {"data": ["fashion", ["bag"], [6], "fast", QUICK], "fn_index": 0, "session_hash": "mine"}
    studio.http("POST", "/gradio_api/queue/join", json.dumps(body).encode(), JSON)
    body = {"data": ["fashion", ["bag"], [7], "fast", QUICK], "fn_index": 0, "session_hash": "yours"}
    studio.http("POST", "/gradio_api/queue/join", json.dumps(body).encode(), JSON)
    for session, seed in (("mine", 6), ("yours", 7)):
        _, _, stream = studio.http("GET", f"/gradio_api/queue/data?session_hash={session}")
        messages = [json.loads(line[5:]) for line in stream.decode().splitlines() if line.startswith("data:")]
        [done] = [message for message in messages if message["msg"] == "process_completed"]
        assert [picture["seed"] for picture in done["output"]["data"][0]["images"]] == [seed]
        assert studio.http("GET", f"/gradio_api/queue/data?session_hash={session}")[0] == 404


def test_use_leaves_nothing_on_the_disk_but_the_times_of_presets(studio: Served) -> None:
    picture = studio.call("draw", *argument())["images"][0]["image"]
    assert studio.call("open", "fashion", picture)["restored"]["label"] == 8
    studio.draw(*argument(known=picture, mask=url_of(encoded(half_mask()))))
    assert len(studio.call("confidence", "fashion", "bag", picture)) == 7
    while None in next(iter(studio.call("models")["models"]))["seconds"].values():
        time.sleep(0.1)
    files = {str(path.relative_to(studio.folder)) for path in studio.folder.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith("user/.cache/matplotlib/")}  # its list of fonts
    assert files == {"output", "home/app-timings.json"}


# ---- the command


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["app", "--no-browser", *arguments]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    [line] = error.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nosuch"], "mar: model: got 'nosuch', expected emoji, fashion, mar-base"),
        (["fashion", "runs/nosuch.safetensors"], "mar: model: got 'runs/nosuch.safetensors', expected"),
        (["--port", "0"], "mar: --port: got 0, expected 1 to 65535"),
        (["--port", "99999"], "mar: --port: got 99999, expected 1 to 65535"),
        (["--host", "nosuch.invalid"], "mar: --host: can't serve on nosuch.invalid, port "),
        (["--host", "x" * 99], "mar: --host: can't serve on xxx"),
        (["--host", "203.0.113.7"], "mar: --host: can't serve on 203.0.113.7, port "),
        (["--device", "nosuch"], "mar: --device: got 'nosuch', expected auto, cpu, "),
    ],
)
def test_app_mistake_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(arguments, capsys).startswith(line)


def test_app_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert mistake(["--port", port], capsys) == (
            f"mar: port {port} of 127.0.0.1 is taken; choose another with --port"
        )


@pytest.mark.parametrize("gradio", [None, ModuleType("gradio")], ids=["missing", "old"])
def test_app_without_gradio_says_how_to_get_it(
    gradio: ModuleType | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if gradio is not None:
        gradio.__version__ = "5.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    line = mistake(["--port", str(free_port())], capsys)
    assert line.startswith("mar: the studio needs gradio")
    assert 'pip install ".[app]" in the clone of mar' in line


# ---- downloads, and the end


def archive(size: int) -> bytes:
    """A zip archive, as torch.save writes them, of what is no model."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("data", bytes(size))
    return buffer.getvalue()


FILES = {"kl16.ckpt": archive(2**20), "mar-base.pth": archive(3 * 2**20)}
DOWNLOADS = """
import sys
from mar.checkpoint import download

port, address = sys.argv[1:]
download.OFFICIAL.update({
    "kl16": (download.RemoteFile("kl16.ckpt", f"{address}/kl16.ckpt", 1, sha256="%s"),),
    "mar-base": (download.RemoteFile("mar-base.pth", f"{address}/mar-base.pth", 3),),
    "mar-large": (download.RemoteFile("mar-large.pth", f"{address}/nosuch", 5),),
})
from mar.cli import main

sys.exit(main(["app", "--no-browser", "--port", port, "--device", "cpu"]))
"""


class SlowFiles(http.server.BaseHTTPRequestHandler):
    """Serves FILES; goes on with mar-base.pth only when it may."""

    go_on = threading.Event()
    fetched: list[str]

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.fetched.append(name)
        if name not in FILES:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("content-length", str(len(FILES[name])))
        self.end_headers()
        half = len(FILES[name]) // 2
        self.wfile.write(FILES[name][:half])
        self.wfile.flush()
        if name == "mar-base.pth":
            self.go_on.wait(WAIT_S)
        self.wfile.write(FILES[name][half:])

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def files() -> Iterator[str]:
    """The address of a server of FILES."""
    SlowFiles.fetched = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowFiles) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_downloads_happen_when_asked_for_and_sigterm_ends_a_draw(tmp_path: Path, files: str) -> None:
    port = free_port()
    script = DOWNLOADS % hashlib.sha256(FILES["kl16.ckpt"]).hexdigest()
    with serve(tmp_path / "served", port, [sys.executable, "-c", script, str(port), files]) as served:

        def described(name: str) -> dict[str, Any]:
            [found] = [each for each in served.call("models")["models"] if each["name"] == name]
            return dict(found)

        def wait_until(name: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            deadline = time.monotonic() + WAIT_S
            while not condition(found := described(name)):
                assert time.monotonic() < deadline, found
                time.sleep(0.05)
            return found

        assert served.call("models")["downloads"] is True
        base = described("mar-base")
        assert (base["state"], base["mebibytes"], base["received"]) == ("absent", 4, None)
        with pytest.raises(Failed, match="error: mar-base is not downloaded: mar download mar-base"):
            served.call("draw", *argument(model="mar-base"))
        assert SlowFiles.fetched == []

        assert served.call("download", "mar-base")
        assert 1 < wait_until("mar-base", lambda found: (found["received"] or 0) > 1)["received"] < 4
        with pytest.raises(Failed, match="error: mar-base is here already, or on its way"):
            served.call("download", "mar-base")
        SlowFiles.go_on.set()
        found = wait_until("mar-base", lambda found: found["state"] == "failed")  # loaded at once; it is no model
        assert found["received"] is None
        assert found["error"]
        assert SlowFiles.fetched == ["kl16.ckpt", "mar-base.pth"]
        for name, content in FILES.items():
            assert (served.folder / "home" / name).read_bytes() == content

        with pytest.raises(Failed, match="error: mar-base can't be loaded: "):
            served.call("draw", *argument(model="mar-base"))
        assert described("mar-base")["state"] == "failed"
        assert served.call("download", "mar-large")
        large = wait_until("mar-large", lambda found: found["error"] != "")
        assert (large["state"], large["received"]) == ("absent", None)
        assert "404" in large["error"]
        assert "\n" not in large["error"]
        with pytest.raises(Failed, match="error: fashion is here already"):
            served.call("download", "fashion")

        events = served.begin_long_draw("")
        started = time.monotonic()
        assert served.stop(signal.SIGTERM) == 130
        assert time.monotonic() - started < WAIT_S / 4  # the draw would take minutes
        events.close()  # type: ignore[attr-defined]
        assert served.said().splitlines() == [
            f"the studio is at http://127.0.0.1:{port} (Ctrl-C stops it)", "mar: stopped; nothing is kept"
        ]  # fmt: skip


def test_space_serves_the_studio_under_any_name_and_downloads_nothing(tmp_path: Path) -> None:
    port = free_port()
    script = (
        "import runpy, sys, mar.app\n"
        "launch, port = mar.app.launch, int(sys.argv[1])\n"
        "mar.app.launch = lambda **options: launch(**{**options, 'port': port})\n"
        "runpy.run_path(sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(port), str(ROOT / "docs/space/app.py")]
    with serve(tmp_path / "served", port, command) as served:
        assert served.http("GET", "/", headers={"host": "owner-name.hf.space"})[0] == 200
        assert served.draw("fashion", ["bag"], [3], "fast", QUICK) == [quick("bag", 3)]
        with pytest.raises(Failed, match="error: this server does not download; on its machine: mar download mar"):
            served.call("download", "mar-base")
        offered = served.call("models")
        assert offered["downloads"] is False
        assert {"emoji", "fashion"} <= {model["name"] for model in offered["models"]}
        assert "Traceback" not in served.said()


def test_app_sigint_while_it_starts_or_draws_ends_it_with_130(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mar", "app", "--no-browser", "--device", "cpu", "--port", str(port)]
    with serve(tmp_path / "served", port, command) as served:
        assert served.stop(signal.SIGINT) == 130  # it loads, or measures, the model
        assert served.said().splitlines()[-1] == "mar: stopped; nothing is kept"
        assert "Traceback" not in served.said()
