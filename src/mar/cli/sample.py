"""`mar sample`: draw images from a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mar.cli.options import (
    SamplingFlags,
    SizeFlag,
    check_asks,
    default_prompts,
    given_labels,
    given_prompts,
    parse,
    save_png,
)
from mar.config import to_dict
from mar.terminal import print_out

if TYPE_CHECKING:
    from PIL import Image

    from mar.pipeline import Pipeline


MAX_COUNT = 10_000
"""Most pictures of each label or prompt: all are kept in memory."""


@dataclass(frozen=True)
class SampleOptions(SizeFlag, SamplingFlags):
    """Draws pictures from a model into a folder of PNGs. Options left out are the model's own defaults."""

    model: Annotated[str, tyro.conf.Positional]
    """fashion, mar-base, mar-large, mar-huge, a file, a folder, or a Hub repository owner/name."""
    labels: tuple[str, ...] = ()
    """Class numbers or names; `none` for no class. By default every class (at most ten), or none."""
    prompt: tuple[str, ...] = ()
    """Words for a model that draws from them; `none` for no condition. By default its examples."""
    prompts: Path | None = None
    """Instead of --prompt: a text file with a prompt a line."""
    count: int = 1
    """Pictures of each label or prompt."""
    seed: int = 0
    """Seed of the first picture; the others count up from it."""
    out: Path = Path("out")
    """Folder for the PNGs."""
    known: Path | None = None
    """Picture to change; `--mask` says where. The rest of it stays as it is."""
    mask: Path | None = None
    """Picture of the size of `--known`, white where to draw, black elsewhere."""
    grow: int = 1
    """Tokens around the white parts that are drawn too, with a soft seam; 0: these parts alone."""
    batch: int = 16
    """Pictures drawn at once; changes memory and speed, and pictures with int8 weights only."""

    def known_and_mask(self, count: int) -> tuple[list[Image.Image] | None, list[Image.Image] | None]:
        """Returns the pictures of --known and --mask for each of `count` images; None: neither was given."""
        from mar.data.images import decode_image
        from mar.sampling.inpainting import WHITE

        if (self.known is None) != (self.mask is None):
            raise ValueError("got only one of --known and --mask, expected both: a picture, and where to draw in it")
        if self.known is None or self.mask is None:
            return None, None
        known, mask = (decode_image(path, str(path)) for path in (self.known, self.mask))
        if max(mask.convert("L").tobytes()) < WHITE:
            raise ValueError(f"{self.mask} has nothing white: expected white where to draw, and black elsewhere")
        return [known] * count, [mask] * count

    def asks(self, model: Pipeline) -> list[str | int | None]:
        """Returns what to draw: the prompts, the labels, or by default classes or examples of the model."""
        labels = given_labels(self.labels)
        prompts = given_prompts(self.prompt, self.prompts)
        check_asks(model, labels, prompts)
        if labels is None and prompts is None and model.captions is None:
            return list(range(min(model.model.config.classes, 10))) or [None]
        return list(labels or prompts or default_prompts(model))


def sample(arguments: Sequence[str]) -> int:
    """Runs `mar sample`."""
    options = parse(SampleOptions, "sample", arguments)
    from mar.checkpoint.files import check_writable
    from mar.data.images import image_grid
    from mar.sampling.sinks.folder import MAX_NAME

    if not 1 <= options.count <= MAX_COUNT:
        raise ValueError(f"--count: got {options.count}, expected 1 to {MAX_COUNT:,}; mar generate draws more")
    check_writable(options.out, is_file=False)
    trained = options.load(options.model)
    model = options.at_size(trained)
    settings = options.settings()
    asks = [ask for ask in options.asks(model) for _ in range(options.count)]
    argument: dict[str, Any] = {model.condition_argument: asks}
    seeds = [options.seed + i for i in range(len(asks))]
    known, mask = options.known_and_mask(len(asks))
    started = time.perf_counter()
    images = model.sample(
        seeds=seeds, batch=options.batch, known=known, mask=mask, grow=options.grow, progress=True,
        allow_broken=options.allow_broken, **argument, **settings,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    facts = {
        "model": options.model, "weights": trained.fingerprint(), "dtype": options.resolved_dtype(model.device),
        **({} if options.image_size is None else {"image_size": model.image_size}),
        **({"tf32": True} if options.tf32 else {}), **to_dict(model.sampling_with(**settings)),
        **({"known": str(options.known), "mask": str(options.mask), "grow": options.grow} if known else {}),
    }  # fmt: skip
    own = [model.condition_metadata(ask) for ask in asks]  # as in PNGs of `mar generate`
    for ask, what, seed, image in zip(asks, own, seeds, images, strict=True):
        ending = f"-{seed:05d}.png"
        name = _file_name(model, ask, MAX_NAME - len(ending)) + ending
        save_png(image, options.out / name, **what, seed=seed, **facts)
    grid = image_grid(images, columns=options.count if options.count > 1 else min(len(images), 10))
    every = {f"{key}s": [what[key] for what in own] for key in own[0]}
    save_png(grid, options.out / "grid.png", **every, seeds=seeds, **facts)
    print_out(f"{len(images)} {'picture' if len(images) == 1 else 'pictures'} and grid.png in {options.out}")
    print_out(f"{seconds:.1f} s, {seconds / len(images):.2f} s a picture, on {model.device}")
    return 0


def _file_name(model: Pipeline, ask: str | int | None, limit: int) -> str:
    """Returns the name of an image's file, without seed: the class, or the prompt, in at most `limit` bytes."""
    from mar.sampling.sinks.folder import prompt_slug, slug

    if model.captions is not None:
        return prompt_slug(str(ask or "none"))
    name = model.classes[ask] if isinstance(ask, int) and model.classes else str("none" if ask is None else ask).lower()
    return slug(name, limit)
