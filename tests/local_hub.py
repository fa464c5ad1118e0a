"""A server on this machine that answers as the Hub does: listings of repositories, and their files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LISTING = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class LocalHub:
    """What is served, and what was asked for."""

    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """Contents by repository and path."""
    url: str = ""
    asked: list[str] = field(default_factory=list)
    lists: bool = True
    """Whether repositories are listed, as the Hub does and plain mirrors of it don't."""
    wrong_hashes: bool = False

    def put(self, address: str, content: bytes) -> None:
        """Serve a file under an address such as hf://owner/name/path."""
        owner, name, path = address.removeprefix("hf://").split("/", 2)
        self.files[f"{owner}/{name.split('@')[0]}", path] = content

    def listing(self, repository: str) -> list[dict[str, Any]] | None:
        """Describe the files of a repository as the Hub's API does; None: there is none."""
        own = {path: content for (holder, path), content in self.files.items() if holder == repository}
        if not own or not self.lists:
            return None
        entries: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "assets"}]
        for path, content in own.items():
            entry = {"type": "file", "oid": "0" * 40, "size": len(content), "path": path}
            if not path.endswith(".json"):  # the others are in git itself
                sha256 = "0" * 64 if self.wrong_hashes else hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def answer(self, path: str) -> bytes | None:
        """Return the body for a path of the server; None: there is none."""
        path = urllib.parse.unquote(path.split("?")[0])
        self.asked.append(path)
        if match := LISTING.fullmatch(path):
            entries = self.listing(match[1])
            return None if entries is None else json.dumps(entries).encode()
        match = FILE.fullmatch(path)
        return self.files.get((match[1], match[3])) if match else None


@contextmanager
def serve_hub() -> Iterator[LocalHub]:
    """Run a local Hub."""
    hub = LocalHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            body = hub.answer(self.path)
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Type", "application/octet-stream")
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.005})
        thread.start()
        hub.url = f"http://127.0.0.1:{listener.server_port}"
        yield hub
        listener.shutdown()
        thread.join()
