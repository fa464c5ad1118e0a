"""`mar download`: fetch the official weights and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mar.cli.options import parse

OfficialName = Literal["kl16", "mar-base", "mar-large", "mar-huge"]


@dataclass(frozen=True)
class DownloadOptions:
    """Fetches official files, or goes on fetching them; checks size and form."""

    names: Annotated[tuple[OfficialName | Literal["all"], ...], tyro.conf.Positional]
    """all, or some of kl16 (254 MiB), mar-base (1.6 GiB), mar-large (3.6 GiB), mar-huge (7.0 GiB)."""
    to: Path | None = None
    """Folder; by default MAR_HOME or ~/.cache/mar, where `mar sample mar-base` looks."""
    mirror: str | None = None
    """Address or folder that has the files, named as here; by default MAR_MIRROR, else the authors' own."""


def download(arguments: Sequence[str]) -> int:
    """Runs `mar download`."""
    options = parse(DownloadOptions, "download", arguments)
    from mar.checkpoint.download import OFFICIAL, fetch, progress_bar

    if not options.names:
        raise ValueError(f"names: got none, expected some of {', '.join(OFFICIAL)}")
    for name in OFFICIAL if "all" in options.names else options.names:
        with progress_bar(name) as progress:
            path = fetch(OFFICIAL[name], options.to, mirror=options.mirror, progress=progress)
        print(path)
    return 0
