"""Griffe extension: in the API reference, `a, b: as in f.` of an Args block is one entry for each argument."""

from __future__ import annotations

import re
from typing import Any

import griffe

SHARED_ENTRY = re.compile(r"^(    )([\w*]+(?:, [\w*]+)+)(:.*(?:\n     .*)*)", re.MULTILINE)


class SplitSharedEntries(griffe.Extension):
    """Gives each argument its own entry, so that griffe finds its type."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a class or function."""
        if obj.docstring and "\nArgs:\n" in obj.docstring.value:
            obj.docstring.value = split_shared_entries(obj.docstring.value)


def split_shared_entries(docstring: str) -> str:
    """Repeat an entry's description for each of its names."""
    return SHARED_ENTRY.sub(
        lambda match: "\n".join(f"{match[1]}{name}{match[3]}" for name in match[2].split(", ")), docstring
    )
