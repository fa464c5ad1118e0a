"""`mar cache`: cache a tokenizer's latents of all images, for training to read instead of the images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mar.cli.options import interruptible, parse
from mar.config import ConfigError, resolve_image_channels
from mar.terminal import print_err, print_out

if TYPE_CHECKING:
    from mar.data.images import Source
    from mar.data.latent_cache import CacheManifest
    from mar.tokenizer import Tokenizer


@dataclass(frozen=True)
class CacheOptions:
    """Caches a tokenizer's latents of pictures, for `mar train --data OUT`. The same command goes on.

    For several processes: torchrun --nproc-per-node 8 -m mar cache DATA ...
    To check a cache: mar cache OUT --verify
    """

    data: Annotated[str, tyro.conf.Positional]
    """fashion, a folder of pictures, Parquet or .tar files, or OWNER/NAME on the Hub; with --verify, a cache."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only check every byte of a cache against its checksums."""
    out: Path | None = None
    """Folder for the cache."""
    tokenizer: str | None = None
    """kl16, detok, dc-ae, pixels, or a folder or Hub repository in diffusers' format."""
    image_size: int | tuple[int, int] | None = None
    """Crop pictures to squares of so many pixels, or to HEIGHT WIDTH."""
    split: Literal["train", "test"] = "train"
    """The part of data that has both."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of the stored latents; they are computed in fp32."""
    flip: bool | None = None
    """Cache mirrored pictures too; by default if the data allows it."""
    caption_column: str | None = None
    """Column of captions in the data; by default text, caption or prompt. Run again, captions are updated."""
    upright: bool | None = None
    """Turn pictures upright by their EXIF orientation; by default as the cache began, a new one True. The reference's
    way is False."""
    shard: int = 1024
    """Pictures of a shard: a process that is killed loses at most one."""
    batch: int = 32
    """Pictures encoded at once by each process; changes memory and speed, latents only by rounding."""
    workers: int = 0
    """Processes that read pictures ahead, for each process that encodes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def cache(arguments: Sequence[str]) -> int:
    """Runs `mar cache`."""
    from mar import devices, distributed

    def run(check: Callable[[], None]) -> int:
        with distributed.collective_errors():
            options = parse(CacheOptions, "cache", arguments)
            if not options.verify:
                _check_options(options)
                devices.choose_device(options.device)
        return _verify(options, check) if options.verify else _write_cache(options, check)

    return interruptible("nothing is changed" if "--verify" in arguments else "the same command goes on", run)


def make_cache(options: CacheOptions, show: Callable[[int, int], None] | None = None) -> int:
    """Writes a cache with all ranks, or goes on with one.

    `show` gets the number of images done, and of all. Returns the exit code: 130 if a signal stopped it.
    """
    return interruptible("the same command goes on", lambda check: _write_cache(options, check, show))


def _check_options(options: CacheOptions) -> None:
    missing = [f"--{name.replace('_', '-')}" for name in ("tokenizer", "out", "image_size")
               if getattr(options, name) is None]  # fmt: skip
    if missing:
        raise ConfigError(f"mar cache needs {', '.join(missing)} too, or --verify to check a cache that is there")
    if options.batch < 1 or options.workers < 0:
        got = f"{options.batch} and {options.workers}"
        raise ConfigError(f"--batch and --workers: got {got}, expected at least 1 and 0")


def _verify(options: CacheOptions, check: Callable[[], None]) -> int:
    from mar.checkpoint.files import size_text
    from mar.data.latent_cache import is_cache, read_manifest, verify
    from mar.sampling.progress import meter

    folder = Path(options.data)
    if not is_cache(folder):
        raise ConfigError(f"{folder} is not a cache that `mar cache` made")
    with meter(True, read_manifest(folder).pictures) as show:

        def advance(done: float) -> None:
            check()
            show(done)

        latents = verify(folder, advance)
    size = size_text(sum(latents.index.sizes))
    skipped = len(latents.index.skipped)
    left_out = f", {skipped:,} left out that could not be read" if skipped else ""
    count = f"{len(latents) - skipped:,} pictures{left_out}"
    print_out(f"{folder} is as it was written: {count}, {size} in {latents.manifest.shards} shards")
    return 0


def _write_cache(
    options: CacheOptions, check: Callable[[], None], show: Callable[[int, int], None] | None = None
) -> int:
    from mar import distributed
    from mar.backends import configure
    from mar.checkpoint.locks import exclusive
    from mar.data.cache_writer import finish_cache, update_captions, write_shards
    from mar.data.captions import captions_of
    from mar.sampling.progress import rank_meter

    out = options.out
    assert out is not None
    with distributed.process_group(options.device) as device, exclusive(out):
        configure(device)
        source, tokenizer, manifest, shards = _prepare(options, out)
        if shards is None:
            with distributed.collective_errors():
                if distributed.rank() == 0:
                    changed = update_captions(out, manifest, captions_of(source))
                    rest = "its captions have changed and are written anew" if changed else "nothing to do"
                    print_out(f"{out} is finished: {manifest.pictures:,} pictures; {rest}")
            return 0
        started = time.perf_counter()
        own = shards[distributed.rank() :: distributed.world_size()]
        share, missing = (sum(len(manifest.span(k)) for k in part) for part in (own, shards))
        before = manifest.pictures - missing
        with rank_meter(share, manifest.pictures, before, check) as advance:

            def advance_and_show(done: int) -> None:
                advance(done)
                if show is not None:
                    show(before + done * missing // max(share, 1), manifest.pictures)

            advance_and_show(0)
            write_shards(
                out, manifest, source, tokenizer, own, device=device, batch=options.batch, workers=options.workers,
                advance=advance_and_show,
            )  # fmt: skip
        distributed.barrier()
        with distributed.collective_errors():
            if distributed.rank() == 0:
                unreadable = finish_cache(out, manifest, captions_of(source))
                _print_summary(out, manifest, unreadable, missing / (time.perf_counter() - started))
    return 0


def _prepare(options: CacheOptions, out: Path) -> tuple[Source, Tokenizer, CacheManifest, list[int] | None]:
    """Opens the source and the tokenizer, and lists the missing shards: None if the cache is finished.

    Rank 0 describes the cache for all.
    """
    from mar import distributed
    from mar.data.cache_writer import describe_cache, prepare_cache
    from mar.data.latent_cache import is_cache, read_manifest
    from mar.data.sources import open_source
    from mar.zoo import load_tokenizer

    assert options.tokenizer is not None
    assert options.image_size is not None
    prepared: tuple[CacheManifest, list[int] | None] | None = None
    with distributed.collective_errors():
        source = open_source(options.data, options.split, options.caption_column)
        tokenizer = load_tokenizer(options.tokenizer, resolve_image_channels(options.data))
        size = options.image_size
        if distributed.rank() == 0:
            begun = read_manifest(out).upright if is_cache(out) else True
            manifest = describe_cache(
                source, tokenizer, data=options.data, tokenizer_name=options.tokenizer, dtype=options.dtype,
                size=(size, size) if isinstance(size, int) else size, flip=options.flip, shard=options.shard,
                upright=begun if options.upright is None else options.upright,
            )  # fmt: skip
            prepared = manifest, prepare_cache(out, manifest)
    manifest, shards = distributed.all_gather_object(prepared)[0]
    return source, tokenizer, manifest, shards


def _print_summary(out: Path, manifest: CacheManifest, unreadable: dict[int, str], speed: float) -> None:
    from mar.checkpoint.files import size_text
    from mar.data.latent_cache import LatentSource

    size = sum(LatentSource(out).index.sizes)
    flips = "plain and flipped" if manifest.flips else "not flipped"
    if unreadable:
        names = ", ".join([*unreadable.values()][:3]) + (", ..." if len(unreadable) > 3 else "")
        print_err(f"{len(unreadable)} pictures could not be read and are left out: {names}")
    print_out(f"{manifest.pictures - len(unreadable):,} pictures in {out}, {flips}, {manifest.dtype}")
    print_out(f"{size_text(size)}, {size / manifest.pictures:,.0f} bytes a picture; {speed:.1f} pictures a second")
