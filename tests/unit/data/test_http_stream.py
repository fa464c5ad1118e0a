"""Streams over HTTP, from a server on this machine."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
from shard_files import png_bytes, write_tar

from mar.data.sources import open_data


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of a tar file, x.tar."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", png_bytes(i)), ("cls", b"%d" % i))]
    write_tar(tmp_path / "web" / "x.tar", members)
    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.skipif(find_spec("aiohttp") is None, reason="the extra http is not installed")
def test_stream_over_http_gives_pictures_and_labels(server: str) -> None:
    source: Any = open_data(f"stream:{server}/x.tar", 3)
    assert [source.example(sample).label for sample in source.preview()] == [0, 1, 2]


def test_stream_over_http_without_aiohttp_names_the_extra(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for name in [name for name in sys.modules if name.startswith("fsspec.implementations.http")]:
        monkeypatch.delitem(sys.modules, name)
    loaded = import_module("fsspec.registry")._registry
    for protocol in ("http", "https"):
        monkeypatch.delitem(loaded, protocol, raising=False)
    with pytest.raises(ValueError, match=r'^data: [^\n]* needs aiohttp: pip install "\.\[http\]" in the clone of mar$'):
        open_data(f"stream:{server}/x.tar", 3)
