"""`mar download`: fetch published weights and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mar.cli.options import parse
from mar.terminal import print_out


@dataclass(frozen=True)
class DownloadOptions:
    """Fetches a model's files and its tokenizer's, or goes on fetching them; checks size and form."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Models or tokenizers as `mar models` lists them, such as mar-base or kl16; all: every one."""
    to: Path | None = None
    """Folder; by default MAR_HOME or ~/.cache/mar, where `mar sample mar-base` looks."""
    mirror: str | None = None
    """Address or folder that has the files, named as here; by default MAR_MIRROR, else the authors' own."""


def download(arguments: Sequence[str]) -> int:
    """Runs `mar download`."""
    options = parse(DownloadOptions, "download", arguments)
    from mar.checkpoint.download import OFFICIAL, fetch, needed, progress_bar
    from mar.published import BUNDLED

    if not options.names:
        raise ValueError(f"names: got none, expected some of {', '.join(OFFICIAL)}")
    for name in options.names:
        if name in BUNDLED:
            raise ValueError(f"{name} comes with the package, so there is nothing to download")
        if name not in (*OFFICIAL, "all"):
            raise ValueError(f"names: got {name!r}, expected all, or some of {', '.join(OFFICIAL)}")
    names = [*OFFICIAL] if "all" in options.names else options.names
    for remote in dict.fromkeys(remote for name in names for remote in needed(name)):
        with progress_bar(remote.name) as progress:
            path = fetch(remote, options.to, mirror=options.mirror, progress=progress)
        print_out(str(path))
    return 0
