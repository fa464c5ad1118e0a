"""Write the tables of models into README.md and docs/models.md, from the records of mar.published.

python tools/model_tables.py    rewrites what is between the markers; a test compares them
"""

from __future__ import annotations

import re
from pathlib import Path

from mar.published import BUNDLED, FAMILIES, PUBLISHED, TOKENIZERS, Figures, PublishedFile, PublishedModel

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- table:{name} -->", "<!-- end -->"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join([_row(*headings), _row(*("---" for _ in headings)), *(_row(*row) for row in rows)])


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.{1 if parameters < 1e7 else 0}f}"


def _pair(figures: Figures) -> str:
    score = "" if figures.inception_score is None else f" / {figures.inception_score:.1f}"
    return f"{figures.fid:.2f}{score}"


def _size(files: tuple[PublishedFile, ...]) -> str:
    sizes = [file.approximate_mebibytes() for file in files]
    if None in sizes:
        return "not known"
    mebibytes = sum(size or 0 for size in sizes)
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def _by_pixels() -> list[tuple[PublishedModel, ...]]:
    """Group the published models: those of a family and size of pictures."""
    groups: dict[tuple[str, int], list[PublishedModel]] = {}
    for model in PUBLISHED.values():
        groups.setdefault((model.family, model.pixels), []).append(model)
    return [tuple(group) for group in groups.values()]


def _names(group: tuple[PublishedModel, ...]) -> list[str]:
    return [name for name, model in PUBLISHED.items() if model in group]


def readme() -> str:
    """Return the table of README.md: a row for each family and size of pictures."""
    rows = []
    for group in _by_pixels():
        first, *others = _names(group)
        prefix = first.split("-")[0]
        names = ", ".join([f"`{first}`", *(f"`{name.removeprefix(prefix)}`" for name in others)])
        rows.append(
            (
                names,
                ", ".join(_millions(model.parameters) for model in group),
                str(group[0].pixels),
                str(group[0].sampling.steps),
                ", ".join(f"{model.figures[0].fid:.2f}" for model in group),
            )
        )
    bundled = BUNDLED.values()
    names = ", ".join(f"`{name}`" for name in BUNDLED)
    sizes, pixels = (
        ", ".join(cells) for cells in zip(*((_millions(b.parameters), str(b.pixels)) for b in bundled), strict=True)
    )
    rows.append((f"{names}: bundled", sizes, pixels, "", ""))
    return _table(("models", "parameters, M", "pixels", "steps", "FID"), rows)


def _settings(figures: Figures) -> str:
    sampling = figures.sampling
    parts = [f"{sampling.steps} steps of {sampling.diffusion_steps}"]
    if sampling.guidance_scale == 1:
        parts.append(f"temperature {sampling.temperature:g}")
    else:
        parts.append(f"guidance {sampling.guidance_scale:g}")
    if sampling.guidance_time != (0.0, 1.0):
        start, end = sampling.guidance_time
        parts.append(f"time {start:g} to {end:g}")
    return ", ".join(parts) + (f"; {figures.note}" if figures.note else "")


def models() -> str:
    """Return the table of docs/models.md: a row for each model and its figures."""
    rows = []
    for name, model in PUBLISHED.items():
        for number, figures in enumerate(model.figures):
            head = model.config.head
            own = (f"`{name}`", f"{_millions(model.parameters)} M", f"{head.depth} x {head.width}", str(model.pixels))
            rows.append((*(own if number == 0 else ("",) * 4), _pair(figures), _settings(figures)))
    headings = ("name", "parameters", "head (blocks x width)", "pixels", "FID / IS", "how its authors drew")
    return _table(headings, rows)


def files() -> str:
    """Return the table of files: a row for each model and tokenizer."""
    records = {**{name: (t.files, t.license) for name, t in TOKENIZERS.items()}}
    records |= {name: (m.files, FAMILIES[m.family].license) for name, m in PUBLISHED.items()}
    rows = []
    for name, (own, license) in records.items():
        places = ", ".join(dict.fromkeys(_place(source) for file in own for source in file.sources))
        checked = "SHA-256" if all(file.sha256 for file in own) else "as the Hub lists it, or its form"
        if own[0].sources[0].startswith("https://") and not own[0].sha256:
            checked = "CRC-32s"
        rows.append((f"`{name}`", places, _size(own), checked, license.split(" (")[0]))
    return _table(("name", "from", "size", "checked by", "license of the code"), rows)


def _place(source: str) -> str:
    hub = re.match(r"hf://([^/@]+/[^/@]+)", source)
    return f"`{hub[1]}`" if hub else "the authors' Dropbox"


def compared() -> str:
    """Return the table of comparisons with figures of the authors' code."""
    rows = [(info.title, info.paper, info.compared) for info in FAMILIES.values()]
    rows += [(tokenizer.title, "", tokenizer.compared) for tokenizer in TOKENIZERS.values()]
    return _table(("", "paper", "compared with recorded figures of the authors' code"), rows)


TABLES = {
    "README.md": {"readme": readme},
    "docs/models.md": {"models": models, "files": files, "compared": compared},
}


def filled(document: str, text: str) -> str:
    """Return a document's text with its tables as they should be. Raises ValueError for missing markers."""
    for name, make in TABLES[document].items():
        begin = BEGIN.format(name=name)
        pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(END), re.DOTALL)
        match = pattern.search(text)
        if match is None or pattern.search(text, match.end()):
            raise ValueError(f"{document} has not one table between {begin!r} and {END!r}")
        text = f"{text[: match.start()]}{begin}\n\n{make()}\n\n{END}{text[match.end() :]}"
    return text


def main() -> None:
    """Rewrite the tables."""
    for document in TABLES:
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        if (new := filled(document, text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"{document}: rewritten")


if __name__ == "__main__":
    main()
