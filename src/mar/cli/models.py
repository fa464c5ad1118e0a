"""`mar models`: the models there are, their figures, and which are on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from mar.cli.options import parse
from mar.terminal import print_out

HEADINGS = ("name", "parameters", "pixels", "FID", "IS", "steps", "download", "here")
_BUNDLED, _HERE = "bundled", "yes"


@dataclass(frozen=True)
class ModelsOptions:
    """Lists the models: bundled ones, published ones, tokenizers; figures, and which are on this machine."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the records as JSON instead, with licenses, settings and files."""


def models(arguments: Sequence[str]) -> int:
    """Runs `mar models`."""
    options = parse(ModelsOptions, "models", arguments)
    records = describe_models()
    if options.json:
        print_out(*json.dumps(records, indent=1).splitlines())
        return 0
    from mar.checkpoint.download import home

    print_out(*_table([_row(record) for record in records]).splitlines())
    print_out("")
    print_out("`mar download NAME` fetches a model and its tokenizer. The last rows are tokenizers.")
    print_out(f"Downloads are in {home()}")
    print_out(
        "FID and IS are the authors', for ImageNet; they were not measured here. Steps: the reveal steps they took."
    )
    return 0


def describe_models() -> list[dict[str, Any]]:
    """Lists the records of all models and tokenizers."""
    from mar.published import BUNDLED, FAMILIES, PUBLISHED, TOKENIZERS

    bundled = [
        {
            "name": name, "kind": "bundled", "about": each.draws, "parameters": each.parameters, "pixels": each.pixels,
            "figures": [], "license": each.license, "files": [], "here": True,
        }
        for name, each in BUNDLED.items()
    ]  # fmt: skip
    published = [
        {
            "name": name, "kind": "model", "family": model.family, "about": FAMILIES[model.family].paper,
            "parameters": model.parameters, "pixels": model.pixels, "tokenizer": model.tokenizer,
            "figures": [_describe_figures(figures) for figures in model.figures],
            "license": FAMILIES[model.family].license, **_describe_files(name),
        }
        for name, model in PUBLISHED.items()
    ]  # fmt: skip
    tokenizers = [
        {
            "name": name, "kind": "tokenizer", "about": each.title, "parameters": each.parameters,
            "channels": each.channels, "stride": each.stride, "figures": [], "license": each.license,
            **_describe_files(name),
        }
        for name, each in TOKENIZERS.items()
    ]  # fmt: skip
    return [*bundled, *published, *tokenizers]


def _describe_figures(figures: Any) -> dict[str, Any]:
    from mar.config import SamplingConfig, to_dict

    defaults = to_dict(SamplingConfig())
    sampling = {name: value for name, value in to_dict(figures.sampling).items() if value != defaults[name]}
    return {
        "fid": figures.fid,
        "inception_score": figures.inception_score,
        "sampling": {"steps": figures.sampling.steps, **sampling},
        "note": figures.note,
    }


def _describe_files(name: str) -> dict[str, Any]:
    from mar.checkpoint.download import hub_url, missing
    from mar.published import files_of

    return {
        "files": [
            {
                "name": file.name,
                "urls": [hub_url(source) for source in file.sources],
                "bytes": file.size,
                "mebibytes": file.approximate_mebibytes(),
                "sha256": file.sha256,
            }
            for file in files_of(name)
        ],
        "here": not missing(name),
        "get": f"mar download {name}",
    }


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    from mar.checkpoint.files import size_text

    best = record["figures"][0] if record["figures"] else None
    score = best and best["inception_score"]
    sizes = [file["mebibytes"] for file in record["files"]]
    known = sizes and None not in sizes
    return (
        record["name"],
        f"{record['parameters'] / 1e6:,.{1 if record['parameters'] < 1e7 else 0}f} M",
        str(record.get("pixels", "")),
        f"{best['fid']:.2f}" if best else "",
        f"{score:.1f}" if score else "",
        str(best["sampling"]["steps"]) if best else "",
        size_text(round(sum(sizes) * 2**20)) if known else _BUNDLED if record["kind"] == "bundled" else "not known",
        _HERE if record["here"] else "",
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    """Formats rows under `HEADINGS`; all but the first column to the right."""
    widths = [max(len(row[column]) for row in (HEADINGS, *rows)) for column in range(len(HEADINGS))]
    lines = []
    for row in (HEADINGS, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)
