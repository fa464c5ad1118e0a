"""Files of others, on the disk or by URL: opened to be read in passing, and the errors of that."""

from __future__ import annotations

import sys
import tarfile
from typing import Any

import pyarrow
from datasets.exceptions import DatasetsError
from datasets.utils.file_utils import xopen

_READ_ERRORS = (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, ImportError, DatasetsError,
                tarfile.TarError, pyarrow.ArrowException)  # fmt: skip
"""Errors of reading files that others wrote."""
_NETWORK_ERRORS = {"httpx2": "HTTPError", "httpx": "HTTPError", "aiohttp": "ClientError"}
"""Errors of networks by library; versions of `datasets` and kinds of URLs use different ones."""


def open_in_passing(file: str) -> Any:
    """Open a path or URL, to be read once from its beginning. Return the file."""
    options: dict[str, Any] = {"block_size": 0} if "://" in file else {}  # no blocks, but a stream
    return xopen(file, "rb", **options)


def read_errors() -> tuple[type[Exception], ...]:
    """Return the errors that reading raises, those of loaded network libraries included."""
    loaded = ((sys.modules.get(library), name) for library, name in _NETWORK_ERRORS.items())
    return (*_READ_ERRORS, *(getattr(library, name) for library, name in loaded if library is not None))


def reason_of(error: BaseException) -> str:
    """Return the first line of an error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
