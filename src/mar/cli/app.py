"""`mar app`: the studio, a web page to draw and edit pictures."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from mar.cli.options import DrawnDtype, interruptible, parse

STOPPED = 130
"""Exit code after Ctrl-C and SIGTERM."""


@dataclass(frozen=True)
class AppOptions:
    """Serves a page where pictures grow, are painted over and changed. Needs `pip install ".[app]"`."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Models to choose from, as `mar sample` takes them; by default the bundled ones."""
    host: str | None = None
    """Address to serve on, such as 0.0.0.0: whoever reaches this machine can then use the page. By default this machine
    alone."""
    port: int | None = None
    """By default the first free one from 7860 on."""
    share: bool = False
    """Make a public address, by gradio's servers: everybody who has it can use the page, for a week at most."""
    browser: bool = True
    """Open the page in the browser."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: DrawnDtype | None = None
    """Precision of the model's matrices: by default bf16 on GPUs that multiply in it, else fp32."""


def app(arguments: Sequence[str]) -> int:
    """Runs `mar app`."""
    options = parse(AppOptions, "app", arguments)
    if options.port is not None and not 1 <= options.port <= 65535:
        raise ValueError(f"--port: got {options.port}, expected 1 to 65535")

    def run(check: object) -> int:
        from mar.app.server import launch

        launch(
            options.models, host=options.host, port=options.port, share=options.share, browser=options.browser,
            device=options.device, dtype=options.dtype,
        )  # fmt: skip
        return 0

    code = interruptible("nothing is kept", run)
    if code == STOPPED:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """End the process without taking down the interpreter.

    Python would wait for the studio's thread, which may be loading a model, and then free torch's modules one by one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
