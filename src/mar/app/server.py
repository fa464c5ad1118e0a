"""The studio's web server: the page, and the API that the page and `gradio_client` use.

gradio has the queue, the stream of events and the API's description; the page is our own, in `static/`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mar.app import settings as words
from mar.app.guard import Guard
from mar.app.pictures import MAX_BYTES
from mar.app.studio import MAX_IMAGES, PRESETS, Studio, read_request

if TYPE_CHECKING:
    import gradio

log = logging.getLogger(__name__)

MAX_QUEUE = 32
"""Requests that may wait; the next one is told to come again."""
EVENT_INTERVAL_S = 0.06
"""Least time between events of a request: what happens in between travels together."""
STATIC = Path(__file__).parent / "static"
PORTS = range(7860, 7960)


@dataclass
class Server:
    """A studio that is being served."""

    studio: Studio
    app: gradio.Server
    url: str
    share_url: str | None = None

    def close(self) -> None:
        """Stop drawing and serving."""
        self.studio.close()
        self.app.get_blocks().close(verbose=False)


def launch(
    models: Sequence[str] = (),
    *,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    browser: bool = False,
    device: str = "auto",
    dtype: str = "fp32",
    block: bool = True,
) -> Server:
    """Serve the studio's page and API; returns when it is stopped.

    Args:
        models: names that `mar.load` takes; none: the bundled ones.
        host: address to serve on. By default 127.0.0.1, which this machine alone can reach.
        port: by default the first free one from 7860 on.
        share: make a public address, by gradio's servers.
        browser: open the page in the browser.
        device, dtype: of the models, as `mar sample` takes them.
        block: whether to wait until it is stopped; if not, `Server.close` stops it.
    """
    gradio = _import_gradio()
    hosted = host is not None or share
    studio = Studio(models or _bundled(), device=device, dtype=dtype, downloads=not hosted)
    functions = Functions(studio)
    app = gradio.Server(docs_url=None, redoc_url=None, openapi_url=None)
    _add_page(app)
    functions.add_to(app)
    app.add_middleware(Guard, defaults=functions.defaults(), hosted=hosted)
    try:
        _, url, share_url = app.launch(
            server_name=host or "127.0.0.1", server_port=port or _free_port(host or "127.0.0.1"), share=share,
            inbrowser=False, prevent_thread_lock=True, quiet=True, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, run_history=False, show_error=False, max_file_size=1,
        )  # fmt: skip
    except OSError as error:
        studio.close()
        raise ValueError(f"can't serve on {host or '127.0.0.1'}:{port}: {' '.join(str(error).split())}") from error
    app.get_blocks()._queue.max_size = MAX_QUEUE  # gradio.Server has no option for it
    server = Server(studio, app, url.rstrip("/"), share_url)
    studio.prepare(next(iter(studio.models)))
    if browser:
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    if block:
        _wait(server)
    return server


def _wait(server: Server) -> None:
    print(f"the studio is at {server.url} (Ctrl-C stops it)", flush=True)
    if server.share_url:
        print(f"and, for everybody who has the address, at {server.share_url}", flush=True)
    try:
        threading.Event().wait()
    finally:
        server.close()


def _import_gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: it asks for a newer version, too
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the studio needs gradio: pip install 'mar[app]' ({error})") from error
    if not hasattr(gradio, "Server"):
        raise ValueError(f"the studio needs gradio 6.10 or later, got {gradio.__version__}: pip install 'mar[app]'")
    return gradio


def _bundled() -> Sequence[str]:
    from mar.zoo import BUNDLED

    return BUNDLED


def _free_port(host: str) -> int:
    for port in PORTS:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            if sys.platform != "win32":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise ValueError(f"ports {PORTS.start} to {PORTS.stop - 1} of {host} are taken; choose another with --port")


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

    def add_to(self, app: gradio.Server) -> None:
        """Register them: drawing is queued, the rest answers at once."""
        for function in self._all():
            drawing = function in (self.draw, self.confidence, self.open)
            options = {"concurrency_id": "draw" if function == self.draw else "look", "concurrency_limit": 1}
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
        return [self.draw, self.stop, self.models, self.load, self.open, self.confidence, self.download]

    async def draw(
        self, model: str, labels: list[Any], seeds: list[int], preset: str | None = None,
        settings: dict[str, Any] | None = None, known: str | None = None, mask: str | None = None, grow: int = 1,
        ticket: str = "",
    ) -> AsyncIterator[dict[str, Any]]:  # fmt: skip
        """Draw pictures, and yield what happens: previews step by step, then the pictures.

        Args:
            model: a name of `models`.
            labels: class names, class numbers or None, one per picture.
            seeds: one per picture.
            preset: exact, balanced, fast, or None for the model's own settings.
            settings: fields of SamplingConfig.
            known: data URL of a picture to change; with `mask`.
            mask: data URL of a picture of the same size, white where to draw.
            grow: tokens around the white parts that are drawn too.
            ticket: a name for this request, for `stop`.
        """
        with _told():
            request = read_request(model, labels, seeds, preset, settings, known, mask, grow)
            self.studio.model(request.model)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def emit(event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        work = self.studio.submit(request, emit, str(ticket))
        work.future.add_done_callback(emit)
        try:
            while True:
                batch = [await events.get()]
                while not events.empty():
                    batch.append(events.get_nowait())
                happened = [event for event in batch if event is not work.future]
                if happened:
                    yield _joined(happened)
                if work.future in batch:
                    break
                await asyncio.sleep(EVENT_INTERVAL_S)
            with _told():
                work.future.result()
        finally:
            work.stop.set()
            self.studio.forget(str(ticket))

    def stop(self, ticket: str) -> bool:
        """Stop the request of this ticket within a reveal step."""
        self.studio.stop(str(ticket))
        return True

    def models(self) -> dict[str, Any]:
        """List the models, the settings and the limits."""
        return {
            "models": self.studio.catalog(), "settings": words.describe_settings(), "presets": list(PRESETS),
            "downloads": self.studio.downloads, "max_images": MAX_IMAGES, "max_bytes": MAX_BYTES,
        }  # fmt: skip

    def load(self, model: str) -> bool:
        """Load a model, behind the requests that wait; `models` shows when it is ready."""
        with _told():
            self.studio.prepare(str(model))
        return True

    def open(self, model: str, picture: str) -> dict[str, Any]:
        """Crop a picture to a model's size; read the settings inside it."""
        with _told():
            return self.studio.open(str(model), picture)

    def confidence(self, model: str, label: Any, picture: str) -> list[list[float]]:
        """Return the diffusion loss of each token of a picture."""
        with _told():
            return self.studio.confidence(str(model), label, picture)

    def download(self, model: str) -> bool:
        """Start the download of an official model; `models` shows its progress."""
        with _told():
            self.studio.download(str(model))
        return True


def _joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last event, with the previews of all of them."""
    previews = [{"step": e["step"], "images": e["images"]} for e in events if e["kind"] == "step" and "images" in e]
    begin = next(({"revealed_at": e["revealed_at"]} for e in events if e["kind"] == "begin"), {})
    last = {name: value for name, value in events[-1].items() if name != "images" or events[-1]["kind"] == "done"}
    return {**begin, **last, "previews": previews}


@contextmanager
def _told() -> Iterator[None]:
    """Turn errors into one line for the page; log those that are ours."""
    import gradio

    try:
        yield
    except (ValueError, OSError) as error:
        raise gradio.Error(" ".join(str(error).split())[:600], print_exception=False) from error
    except (RuntimeError, MemoryError, TypeError, KeyError, IndexError) as error:
        log.exception("a request failed")
        line = f"this failed in the studio ({type(error).__name__}); its log says more"
        raise gradio.Error(line, print_exception=False) from error
