"""The studio's web server: the page, and the API that the page and `gradio_client` use.

gradio has the queue, the stream of events and the API's description; the page is our own, in `static/`.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
import os
import socket
import struct
import sys
import threading
import warnings
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mar.app import settings as words
from mar.app.guard import Guard
from mar.app.pictures import MAX_BYTES
from mar.app.queueing import Streams
from mar.app.studio import MAX_IMAGES, MAX_PROMPT, PRESETS, Studio, read_request
from mar.terminal import print_out

if TYPE_CHECKING:
    import gradio

log = logging.getLogger(__name__)

EVENT_INTERVAL_S = 0.06
"""Least time between events of a request: what happens in between travels together."""
STATIC = Path(__file__).parent / "static"
PORTS = range(7860, 7960)
FIRST = ("emoji", "fashion")
"""Bundled models in the page's order; the first one that there is is its default."""


@dataclass
class Server:
    """A studio that is being served."""

    studio: Studio
    app: gradio.Server
    url: str
    share_url: str | None = None

    def wait(self) -> None:
        """Print the address, then wait for Ctrl-C."""
        print_out(f"the studio is at {self.url} (Ctrl-C stops it)")
        if self.share_url:
            print_out(f"and, for everybody who has the address, at {self.share_url}")
        threading.Event().wait()

    def close(self) -> bool:
        """Stop serving and drawing; returns whether the studio's thread has ended."""
        ended = self.studio.close()
        blocks = self.app.get_blocks()
        blocks.server.force_exit = True  # or it waits for open streams; that these break off then is no news
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        blocks.close(verbose=False)
        return ended


def launch(
    models: Sequence[str] = (),
    *,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    browser: bool = False,
    device: str = "auto",
    dtype: str | None = None,
    block: bool = True,
) -> Server:
    """Serve the studio's page and API; returns when it is stopped.

    Args:
        models: names that `mar.load` takes; none: the bundled ones.
        host: address to serve on. By default 127.0.0.1, which this machine alone can reach.
        port: by default the first free one from 7860 on.
        share: make a public address, by gradio's servers.
        browser: open the page in the browser.
        device: of the models, as `mar sample` takes it.
        dtype: their precision; by default bf16 on GPUs that multiply in it, else fp32.
        block: whether to wait until it is stopped; if not, `Server.close` stops it.
    """
    hosted = host is not None or share
    host = host or "127.0.0.1"
    port = _free_port(host, PORTS if port is None else range(port, port + 1))
    _check_choices(models, device)
    gradio = _import_gradio()
    _bypass_proxies(host)
    from mar.devices import choose_device, default_precision

    dtype = dtype or default_precision(choose_device(device))
    studio = Studio(models or _bundled(), device=device, dtype=dtype, downloads=not hosted)
    functions = Functions(studio)
    app = gradio.Server(docs_url=None, redoc_url=None, openapi_url=None)
    _add_page(app)
    functions.add_to(app)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # it warns of oddities in the files of others
    app.add_middleware(
        Guard, streams=functions.streams, queue=lambda: app.get_blocks()._queue, defaults=functions.defaults(),
        hosted=hosted,
    )  # fmt: skip
    try:
        _, url, share_url = app.launch(
            server_name=host, server_port=port, share=share,
            inbrowser=False, prevent_thread_lock=True, quiet=True, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, run_history=False, show_error=False, max_file_size=1, state_session_capacity=100,
        )  # fmt: skip
    except OSError as error:
        studio.close()
        raise ValueError(f"can't serve on {host}, port {port}: {' '.join(str(error).split())}") from error
    server = Server(studio, app, url.rstrip("/"), share_url)
    studio.prepare(next(iter(studio.models)))
    if browser:
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    if block:
        try:
            server.wait()
        finally:
            server.close()
    return server


def _import_gradio() -> Any:
    """Import gradio without its statistics."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: it asks for a newer version, too
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f'the studio needs gradio: pip install ".[app]" in the clone of mar ({error})') from error
    if not hasattr(gradio, "Server"):
        raise ValueError(
            f'the studio needs gradio 6.10 or later, got {gradio.__version__}: pip install ".[app]" in the clone of mar'
        )
    return gradio


def _bypass_proxies(host: str) -> None:
    """Except this machine from the environment's proxies: gradio asks its own server whether it is there."""
    names = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", host]
    os.environ["no_proxy"] = ",".join(filter(None, names))


def _bundled() -> Sequence[str]:
    """List the bundled models; the first one is the page's default."""
    from mar.zoo import BUNDLED

    return sorted(BUNDLED, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def _check_choices(models: Sequence[str], device: str) -> None:
    """Raise ValueError for a model or a device that there is not, before anything is served."""
    if models:
        from mar.zoo import check_name

        for name in models:
            check_name(name)
    if device != "auto":
        from mar.devices import choose_device

        choose_device(device)


def _free_port(host: str, ports: range) -> int:
    """Return the first port that is free. Raises ValueError, which says why there is none."""
    for port in ports:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                if sys.platform != "win32":
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label of more than 63 characters
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                continue
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"host: can't serve on {host}, port {port}: {reason}") from error
        return port
    taken = f"port {ports[0]} of {host} is" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]} of {host} are"
    raise ValueError(f"{taken} taken; choose another with --port")


def _add_page(app: gradio.Server) -> None:
    """Add the page and its files, which are read once."""
    from fastapi import Response
    from fastapi.responses import JSONResponse

    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    files = {path.name: path.read_bytes() for path in STATIC.iterdir() if path.suffix in kinds}

    async def page() -> Response:
        return Response(files["index.html"], media_type="text/html")

    async def file(name: str) -> Response:
        if name not in files:
            return JSONResponse({"error": "there is nothing here"}, 404)
        return Response(files[name], media_type=kinds[Path(name).suffix])

    async def icon() -> Response:
        return Response(files["icon.svg"], media_type=kinds[".svg"])

    app.add_api_route("/", page)
    app.add_api_route("/static/{name}", file)
    app.add_api_route("/favicon.ico", icon)


class Functions:
    """The functions of the API, each a door to the studio."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        queued = (self.draw, self.confidence, self.open, self.check)
        self.streams = Streams(drawing=[function.__name__ for function in queued])

    def add_to(self, app: gradio.Server) -> None:
        """Register them: drawing is queued, the rest answers at once."""
        for function in self._all():
            drawing = function.__name__ in self.streams.drawing
            lane = function.__name__ if function in (self.draw, self.confidence) else "look"
            options = {"concurrency_id": lane, "concurrency_limit": 1}
            app.api(function, name=function.__name__, queue=drawing, **(options if drawing else {}))

    def defaults(self) -> dict[str, list[Any]]:
        """Return the defaults of each function's parameters, `...` if there is none."""
        return {
            function.__name__: [
                ... if parameter.default is parameter.empty else parameter.default
                for parameter in inspect.signature(function).parameters.values()
            ]
            for function in self._all()
        }

    def _all(self) -> list[Callable[..., Any]]:
        return [self.draw, self.stop, self.models, self.load, self.open, self.confidence, self.download, self.check]

    async def draw(
        self, model: str, labels: list[Any] | None, seeds: list[int], preset: str | None = None,
        settings: dict[str, Any] | None = None, known: str | None = None, mask: str | None = None, grow: int = 1,
        ticket: str = "", prompts: list[Any] | None = None,
    ) -> AsyncIterator[dict[str, Any]]:  # fmt: skip
        """Draw pictures, and yield what happens: previews step by step, then the pictures.

        Args:
            model: a name of `models`.
            labels: class names, class numbers or None, one per picture; None: there are prompts.
            seeds: one per picture.
            preset: exact, balanced, fast, or None for the model's own settings.
            settings: fields of SamplingConfig.
            known: data URL of a picture to change; with `mask`.
            mask: data URL of a picture of the same size, white where to draw.
            grow: tokens around the white parts that are drawn too.
            ticket: a name for this request, for `stop`.
            prompts: what to draw, in words, one per picture, for a model that draws from them.
        """
        from gradio.context import LocalContext

        event_id = LocalContext.event_id.get(None)
        with _told():
            if not isinstance(ticket, str):
                raise ValueError(f"ticket: got {type(ticket).__name__}, expected a text")
            self.studio.model(model)
            request = await asyncio.to_thread(
                read_request, model, labels, seeds, preset, settings, known, mask, grow, prompts
            )  # fmt: skip
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def emit(event: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(events.put_nowait, event)

        work = self.studio.submit(request, emit, ticket)
        work.future.add_done_callback(emit)
        try:
            while True:
                batch = [await events.get()]
                while not events.empty():
                    batch.append(events.get_nowait())
                happened = [event for event in batch if event is not work.future]
                if happened:
                    yield _joined(happened, previews=not self.streams.behind(event_id))
                if work.future in batch:
                    break
                await asyncio.sleep(EVENT_INTERVAL_S)
            with _told():
                work.future.result()
        finally:
            work.stop.set()

    def stop(self, ticket: str) -> bool:
        """Stop the request of this ticket within a reveal step."""
        with _told():
            if not isinstance(ticket, str):
                raise ValueError(f"ticket: got {type(ticket).__name__}, expected a text")
            self.studio.stop(ticket)
        return True

    def models(self) -> dict[str, Any]:
        """List the models, the settings and the limits."""
        return {
            "models": self.studio.catalog(), "settings": words.describe_settings(), "presets": list(PRESETS),
            "downloads": self.studio.downloads, "max_images": MAX_IMAGES, "max_bytes": MAX_BYTES,
            "max_prompt": MAX_PROMPT,
        }  # fmt: skip

    def load(self, model: str) -> bool:
        """Load a model, behind the requests that wait; `models` shows when it is ready."""
        with _told():
            self.studio.prepare(model)
        return True

    def open(self, model: str, picture: str) -> dict[str, Any]:
        """Crop a picture to a model's size; read the settings inside it."""
        with _told():
            return self.studio.open(model, picture)

    def confidence(self, model: str, label: Any, picture: str, prompt: str | None = None) -> list[list[float]]:
        """Return the diffusion loss of each token of a picture.

        Args:
            model: a name of `models`.
            label: class name, class number or None.
            picture: data URL.
            prompt: instead of a label, for a model that draws from words.
        """
        with _told():
            return self.studio.confidence(model, label, picture, prompt)

    def check(self, model: str, prompts: list[Any]) -> dict[str, Any]:
        """Tell the unknown words of prompts, with the nearest known ones."""
        with _told():
            return self.studio.check(model, prompts)

    def download(self, model: str) -> bool:
        """Start the download of an official model; `models` shows its progress."""
        with _told():
            self.studio.download(model)
        return True


def _joined(events: list[dict[str, Any]], previews: bool) -> dict[str, Any]:
    """Return the last event, with the previews of all of them."""
    drawn = [{"step": e["step"], "images": e["images"]} for e in events if e["kind"] == "step" and "images" in e]
    begin = next(({"revealed_at": e["revealed_at"]} for e in events if e["kind"] == "begin"), {})
    last = {name: value for name, value in events[-1].items() if name != "images" or events[-1]["kind"] == "done"}
    return {**begin, **last, "previews": drawn if previews else []}


_OURS = (
    RuntimeError, MemoryError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, SyntaxError,
    struct.error,
)  # fmt: skip


@contextmanager
def _told() -> Iterator[None]:
    """Turn errors into one line for the page; log those that are ours."""
    import gradio

    try:
        yield
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())[:600]
        raise gradio.Error(line, print_exception=False) from error
    except CancelledError:
        raise gradio.Error("the studio is closing", print_exception=False) from None
    except _OURS as error:
        log.exception("a request failed")
        line = f"this failed in the studio ({type(error).__name__}); its log says more"
        raise gradio.Error(line, print_exception=False) from error
