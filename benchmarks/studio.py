"""How soon the studio is there, how soon a picture is seen, and what watching it costs.

    python benchmarks/studio.py

Prints three claims, each a median over rounds. First, seconds from `mar app` to a page that answers, and to a loaded
model. Second, seconds from a request to its first intermediate picture. Third, the time of a watched drawing, over HTTP
with all its previews, against `model.sample` of the same pictures. Both are taken in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from mar.app import launch
from mar.zoo import load

REQUESTS: dict[str, dict[str, Any]] = {
    "one picture, as the model draws": {"labels": [3], "seeds": [0]},
    "four pictures, as the model draws": {"labels": [0, 3, 6, 9], "seeds": [0, 1, 2, 3]},
    "four pictures, 49 reveal steps of 100": {
        "labels": [0, 3, 6, 9], "seeds": [0, 1, 2, 3], "settings": {"steps": 49, "diffusion_steps": 100},
    },
}  # fmt: skip


def post(url: str, name: str, data: list[Any]) -> str:
    """Send a call; returns the address of its events."""
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/call/{name}", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return f"{url}/gradio_api/call/{name}/{json.load(answer)['event_id']}"


def events(url: str, name: str, data: list[Any]) -> Iterator[Any]:
    """Yield the results of a call, as they come."""
    with urllib.request.urlopen(post(url, name, data)) as stream:
        for line in stream:
            if line.startswith(b"data: ") and line.strip() != b"data: null":
                yield json.loads(line[6:])[0]


def start() -> tuple[float, float]:
    """Start `mar app`; return the seconds to a page that answers, and to a loaded model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, begun = f"http://127.0.0.1:{port}", time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "mar", "app", "--no-browser", "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "MAR_HOME": home})
        try:
            while True:
                try:
                    with urllib.request.urlopen(url):
                        [catalog] = events(url, "models", [])
                        break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.02)
            page = time.perf_counter() - begun
            while catalog["models"][0]["state"] != "ready":
                time.sleep(0.02)
                [catalog] = events(url, "models", [])
            return page, time.perf_counter() - begun
        finally:
            process.terminate()
            process.wait()


def watch(url: str, request: dict[str, Any]) -> tuple[float, float, int]:
    """Draw and watch; return the seconds to the first preview, to the end, and the number of previews."""
    begun, first, previews = time.perf_counter(), 0.0, 0
    data = ["fashion", request["labels"], request["seeds"], None, request.get("settings")]
    for event in events(url, "draw", data):
        if event["previews"] and not previews:
            first = time.perf_counter() - begun
        previews += len(event["previews"])
    return first, time.perf_counter() - begun, previews


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds

    starts = [start() for _ in range(min(rounds, 3))]
    page, ready = (statistics.median(each) for each in zip(*starts, strict=True))
    print(f"mar app: {page:.1f} s to the page, {ready:.1f} s to the loaded model")

    model = load("fashion", device="cpu")
    server = launch(["fashion"], block=False)
    try:
        for name, request in REQUESTS.items():
            settings = request.get("settings", {})
            watch(server.url, request)
            model.sample(request["labels"], request["seeds"], **settings)
            watched, plain = [], []
            for _ in range(rounds):
                watched.append(watch(server.url, request))
                begun = time.perf_counter()
                model.sample(request["labels"], request["seeds"], **settings)
                plain.append(time.perf_counter() - begun)
            first, whole = (statistics.median(each[i] for each in watched) for i in (0, 1))
            ratio = statistics.median(each[1] / other for each, other in zip(watched, plain, strict=True))
            print(f"{name}: first of {watched[-1][2]} previews after {first:.2f} s; ", end="")
            print(f"{whole:.2f} s watched, {statistics.median(plain):.2f} s by model.sample, ratio {ratio:.2f}")
    finally:
        server.close()


if __name__ == "__main__":
    main()
