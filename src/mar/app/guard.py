"""The doorkeeper of the API: whom it lets in, through which doors, and with how much.

It stands before gradio's server. Its doors are `call/NAME` (one POST, then a stream of events) and those that
`gradio_client` needs. Files are neither taken nor given: pictures travel inside JSON.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mar.app.queueing import Streams

MAX_BODY = 32 * 2**20
"""Most bytes of a request: two pictures, as base64, and their settings."""
MAX_BODIES = 128 * 2**20
"""Most bytes of all requests that are being received."""
BODY_S = 120.0
"""Longest time that a body may take to arrive."""
MAX_VALUES = 5000
"""Most commas and brackets of a body: JSON of short values takes much more memory than its text."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_DOORS = {
    "GET": re.compile(
        r"/|/static/[\w-]+\.\w+|/favicon\.ico|/config/?"
        r"|(/gradio_api)?/(info|queue/data|startup-events|app_id)/?|/gradio_api/(call/\w+/\w+|heartbeat/\w+)"
    ),
    "POST": re.compile(r"/gradio_api/(call/\w+|queue/join|cancel|reset)/?"),
}
_STREAM = re.compile(r"/gradio_api/(?:call/\w+/(\w+)|queue/data)/?")
_SESSION = re.compile(r"[\w-]{1,64}")
_CALL = re.compile(r"/gradio_api/call/(\w+)/?")
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Refused(Exception):
    """An HTTP status and a line, for a request that is refused."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Guard:
    """ASGI middleware that refuses what the studio does not serve.

    gradio answers an event stream that nobody asked for, or that was read before, with a traceback in its log. So the
    guard lets in each stream that a call began once.

    Args:
        app: behind it.
        streams: of the calls.
        queue: returns gradio's queue, which is there once it serves.
        defaults: name of each function of the API -> defaults of its parameters, in order; `...` if it has none.
        hosted: whether the server is meant for other machines, under any name.
    """

    def __init__(
        self, app: App, streams: Streams, queue: Callable[[], Any], defaults: Mapping[str, list[Any]],
        hosted: bool = False,
    ) -> None:  # fmt: skip
        self.app, self.streams, self.queue, self.defaults, self.hosted = app, streams, queue, defaults, hosted
        self._received = 0
        """Bytes of the bodies that are being received."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            try:
                self._check(scope)
                if scope["method"] == "POST":
                    await self._serve_call(scope, receive, _with_headers(send))
                elif stream := _STREAM.fullmatch(scope["path"]):
                    await self._serve_stream(stream[1] or _session(scope), scope, receive, _with_headers(send))
                else:
                    await self.app(scope, receive, _with_headers(send))
            except Refused as refused:
                await _answer(send, refused.status, str(refused))

    async def _serve_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.streams.bound:
            self.streams.bind(self.queue())
        body = self._body(scope, await self._read(receive))

        async def note(message: Message) -> None:
            event = re.search(rb'"event_id":\s*"([0-9a-f]+)"', message.get("body", b""))
            if event is not None:
                self.streams.begin(body.get("session_hash") or event[1].decode())
            await send(message)

        await self.app(scope, _replay(json.dumps(body).encode(), receive), note)

    async def _serve_stream(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.streams.open(name):
            raise Refused(404, "there are no such events, or they were read before")
        gone = False

        async def watch() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        try:
            await self.app(scope, watch, send)
        finally:
            await self.streams.close(name, gone)

    def _check(self, scope: Scope) -> None:
        """Raise Refused for a wrong host, origin, path or length."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self.hosted and _hostname(host) not in LOCAL_HOSTS:
            raise Refused(403, f"this page is served for {LOCAL_HOSTS[0]} only; start it with --host to change that")
        origin = headers.get("origin")
        if origin is not None and not self.hosted and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "another site's page may not use this one")
        door = _DOORS.get("GET" if scope["method"] == "HEAD" else scope["method"])
        if door is None or not door.fullmatch(scope["path"]):
            raise Refused(404, "there is nothing here")
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0] != "application/json":
            raise Refused(415, "expected JSON, with the content type application/json")
        length = headers.get("content-length", "0")
        if not re.fullmatch(r"[0-9]{1,15}", length) or int(length) > MAX_BODY:
            raise Refused(413, f"got more than {MAX_BODY // 2**20} MiB; send smaller pictures")

    def _body(self, scope: Scope, body: bytes) -> dict[str, Any]:
        """Complete the arguments of a call with the defaults; refuse what is no call."""
        if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise Refused(400, "got too many values in one request")
        try:
            content = json.loads(body or b"{}")
            json.dumps(content, ensure_ascii=False).encode()
        except (ValueError, RecursionError):  # UnicodeEncodeError of half a surrogate pair, too
            raise Refused(400, "got a body that is not JSON") from None
        if not isinstance(content, dict):
            raise Refused(400, "got JSON that is no object")
        session = content.get("session_hash")
        if session is not None and not (isinstance(session, str) and _SESSION.fullmatch(session)):
            raise Refused(400, "session_hash: expected at most 64 letters, digits and dashes")
        if call := _CALL.fullmatch(scope["path"]):
            return {"data": self._arguments(call[1], content.get("data"))}
        if scope["path"].rstrip("/").endswith("join"):
            number, names = content.get("fn_index"), list(self.defaults)
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
                raise Refused(404, f"fn_index: got {str(number)[:40]}, expected 0 to {len(names) - 1}")
            if not session:
                raise Refused(400, "session_hash: got none")
            data = self._arguments(names[number], content.get("data"))
            return {"data": data, "fn_index": number, "session_hash": session}
        return content

    def _arguments(self, name: str, data: Any) -> list[Any]:
        defaults = self.defaults.get(name)
        if defaults is None:
            raise Refused(404, f"there is no {name[:40]}; there are {', '.join(self.defaults)}")
        if not isinstance(data, list) or len(data) > len(defaults) or ... in defaults[len(data) :]:
            raise Refused(400, f"data: expected a list of {len(defaults)} arguments, the last ones with defaults")
        if not all(map(_is_plain, data)):  # gradio would take some objects for files, and fetch or copy them
            raise Refused(400, "data: expected texts, numbers, lists and settings, none inside another")
        return [*data, *defaults[len(data) :]]

    async def _read(self, receive: Receive) -> bytes:
        """Read the body of a request. Raises Refused if it is too large or too slow."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the request broke off")
                    part = message.get("body", b"")
                    self._received += len(part)
                    body += part
                    if len(body) > MAX_BODY:
                        raise Refused(413, f"got more than {MAX_BODY // 2**20} MiB; send smaller pictures")
                    if self._received > MAX_BODIES:
                        raise Refused(503, "busy: too many requests arrive at once; try again in a moment")
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refused(408, f"the request took more than {BODY_S:.0f} s to arrive") from None
        finally:
            self._received -= len(body)


def _is_plain(value: Any) -> bool:
    """Return whether an argument is a scalar, a list of scalars, or an object of those."""
    if isinstance(value, dict):
        return not any(isinstance(each, dict) for each in value.values()) and all(map(_is_plain, value.values()))
    return not isinstance(value, list) or not any(isinstance(each, list | dict) for each in value)


def _with_headers(send: Send) -> Send:
    """Return a `send` that adds the headers of `_HEADERS`."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message["headers"] = [*message.get("headers", ()), *own]
        await send(message)

    return send_with_headers


def _session(scope: Scope) -> str:
    """Return the session of a stream's query."""
    return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [""])[0]


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body`, then waits for the end of the connection."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _answer(send: Send, status: int, line: str) -> None:
    body = json.dumps({"error": line}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
