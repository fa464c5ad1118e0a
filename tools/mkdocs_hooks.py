"""Hooks of the documentation site: links into the code, and a check that public names have docstrings."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s#]+)\)")
log = logging.getLogger("mkdocs.plugins.mar")
"""mkdocs counts its warnings: one fails the strict build."""


def on_pre_build(**_: Any) -> None:
    """Warn about every public name without a docstring."""
    package = griffe.load("mar", search_paths=[ROOT / "src"])
    modules = documented_modules()
    for name in sorted(public_names(package)):
        if package[name].final_target.module.path not in modules:
            log.warning("mar.%s is public, but no page of docs/api has its module", name)
    for module in sorted(modules):
        for path in undocumented(package[module.removeprefix("mar.")]):
            log.warning("%s has no docstring; give it one, or a name that begins with _", path)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace links to documented modules by links to the API reference, and other links to code by their text.

    A link to a missing file is left alone, so that the strict build fails.
    """
    folder = Path(page.file.abs_src_path).parent
    documented = documented_modules()

    def replacement(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs") or not path.exists():
            return match.group(0)
        if path.suffix != ".py" or not path.is_relative_to(ROOT / "src"):
            return text
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        name = text.strip("`")
        return f"[{text}][{name if name.startswith(f'{module}.') else module}]" if module in documented else text

    return LINK.sub(replacement, markdown)


def documented_modules() -> set[str]:
    """Read the names after `:::` in docs/api."""
    pages = (path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    return {name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}


def public_names(package: griffe.Module) -> list[str]:
    """Read `mar.__all__`."""
    return list(ast.literal_eval(str(package["__all__"].value)))


def undocumented(owner: Any) -> Iterator[str]:
    """Yield the paths of a module's or a class's public members without a docstring.

    Fields of a class may go without; a method may have the docstring of a base class.
    """
    if not owner.docstring:
        yield owner.path
    for member in owner.members.values():
        if member.is_alias or member.name.startswith("_") or member.name == "logger":
            continue
        if member.is_class:
            yield from undocumented(member)
        elif not (member.docstring or (owner.is_class and (member.is_attribute or inherits(owner, member.name)))):
            yield member.path


def inherits(owner: griffe.Class, name: str) -> bool:
    """Tell if a base class of the package documents the method `name`."""
    return any(name in base.members and base.members[name].docstring for base in owner.mro())
