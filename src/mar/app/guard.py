"""The doorkeeper of the API: whom it lets in, through which doors, and with how much.

It stands before gradio's server. Its doors are `call/NAME` (one POST, then a stream of events) and those that
`gradio_client` needs. Files are neither taken nor given: pictures travel inside JSON.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_BODY = 32 * 2**20
"""Most bytes of a request: two pictures, as base64, and their settings."""
MAX_BEGUN = 10_000
"""Streams that may be read, of calls whose events were not read yet."""
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
        defaults: name of each function of the API -> defaults of its parameters, in order; `...` if it has none.
        hosted: whether the server is meant for other machines, under any name.
    """

    def __init__(self, app: App, defaults: Mapping[str, list[Any]], hosted: bool = False) -> None:
        self.app, self.defaults, self.hosted = app, defaults, hosted
        self.begun: OrderedDict[str, None] = OrderedDict()
        """Events and sessions whose streams may be read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        session = ""
        try:
            self._check(scope)
            if scope["method"] == "POST":
                body = self._body(scope, await _read(receive))
                session = body.get("session_hash", "")
                receive = _replay(json.dumps(body).encode(), receive)
            stream = _STREAM.fullmatch(scope["path"])
            if stream and self.begun.pop(stream[1] or _session(scope), self) is self:
                raise Refused(404, "there are no such events, or they were read before")
        except Refused as refused:
            await _answer(send, refused.status, str(refused))
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            elif scope["method"] == "POST":
                self._note_stream(message.get("body", b""), session)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _note_stream(self, answer: bytes, session: str) -> None:
        """Let in the stream of an event, or of its session."""
        match = re.search(rb'"event_id":\s*"([0-9a-f]+)"', answer)
        if match is not None:
            for name in (match[1].decode(), session):
                self.begun[name] = None
            while len(self.begun) > MAX_BEGUN:
                self.begun.popitem(last=False)

    def _check(self, scope: Scope) -> None:
        """Raise Refused for a wrong host, origin, path or length."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self.hosted and _hostname(host) not in LOCAL_HOSTS:
            raise Refused(403, f"this page is served for {LOCAL_HOSTS[0]} only; start it with --host to change that")
        origin = headers.get("origin")
        if origin is not None and not self.hosted and urlsplit(origin).netloc != host:
            raise Refused(403, "another site's page may not use this one")
        door = _DOORS.get("GET" if scope["method"] == "HEAD" else scope["method"])
        if door is None or not door.fullmatch(scope["path"]):
            raise Refused(404, "there is nothing here")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY:
            raise Refused(413, f"got more than {MAX_BODY // 2**20} MiB; send smaller pictures")

    def _body(self, scope: Scope, body: bytes) -> dict[str, Any]:
        """Complete the arguments of a call with the defaults; refuse what is no call."""
        try:
            content = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            raise Refused(400, "got a body that is not JSON") from None
        if not isinstance(content, dict):
            raise Refused(400, "got JSON that is no object")
        session = content.get("session_hash")
        if session is not None and not (isinstance(session, str) and _SESSION.fullmatch(session)):
            raise Refused(400, "session_hash: expected at most 64 letters, digits and dashes")
        if call := _CALL.fullmatch(scope["path"]):
            data = self._arguments(call[1], content.get("data"))
            return {"data": data} | ({"session_hash": session} if session else {})
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
        return [*data, *defaults[len(data) :]]


def _session(scope: Scope) -> str:
    """Return the session of a stream's query."""
    return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [""])[0]


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _read(receive: Receive) -> bytes:
    """Read the body of a request. Raises Refused if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the request broke off")
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise Refused(413, f"got more than {MAX_BODY // 2**20} MiB; send smaller pictures")
        if not message.get("more_body", False):
            return bytes(body)


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
