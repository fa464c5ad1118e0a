"""`mar cache`: a tokenizer's latents of all pictures, made once, for training to read instead of the pictures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mar.cli.options import parse, stoppable
from mar.config import ConfigError, resolve_image_channels

if TYPE_CHECKING:
    import torch

    from mar.data.images import Source
    from mar.data.latent_cache import CacheManifest
    from mar.tokenizer import Tokenizer


@dataclass(frozen=True)
class CacheOptions:
    """Caches what a tokenizer makes of pictures; `mar train --data OUT` learns from it. The same command goes on.

    For several processes: torchrun --nproc-per-node 8 -m mar cache DATA ...
    To check a cache: mar cache OUT --verify
    """

    data: Annotated[str, tyro.conf.Positional]
    """fashion, a folder of pictures, Parquet or .tar files, or OWNER/NAME on the Hub; with --verify, a cache."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Hold every byte of a cache against its checksums, and do nothing else."""
    out: Path | None = None
    """Folder for the cache."""
    tokenizer: str | None = None
    """kl16, pixels, or a folder or Hub repository in diffusers' format."""
    image_size: int | tuple[int, int] | None = None
    """Pictures are cut to squares of so many pixels, or to HEIGHT WIDTH."""
    split: Literal["train", "test"] = "train"
    """Part of the data, where it has both."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Type of stored latents; they are computed in fp32."""
    flip: bool | None = None
    """Cache mirrored pictures too; by default, where the data says that its pictures may be."""
    shard: int = 1024
    """Pictures of a shard: what is lost at most where a process is killed."""
    batch: int = 32
    """Pictures encoded at once by each process; changes memory and speed, latents only by rounding."""
    workers: int = 0
    """Processes that read pictures ahead, for each process that encodes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def cache(arguments: Sequence[str]) -> int:
    """Run `mar cache`."""
    from mar import devices, distributed

    def work(check: Callable[[], None]) -> int:
        with distributed.collective_errors():
            options = parse(CacheOptions, "cache", arguments)
            if not options.verify:
                _complete(options)
                devices.choose_device(options.device)
        return _verify(options, check) if options.verify else _cache(options, check)

    return _stoppably(work, "" if "--verify" in arguments else "; the same command goes on")


def make_cache(options: CacheOptions) -> int:
    """Makes a cache, or goes on with one, with all processes. Returns the exit code: 130 where a signal stopped it."""
    return _stoppably(lambda check: _cache(options, check), "; the same command goes on")


def _stoppably(work: Callable[[Callable[[], None]], int], again: str) -> int:
    from mar import distributed

    with stoppable() as check:
        try:
            return work(check)
        except KeyboardInterrupt:
            if distributed.rank() == 0:
                print(f"mar: stopped{again}", file=sys.stderr)
            return 130


def _complete(options: CacheOptions) -> None:
    missing = [f"--{name.replace('_', '-')}" for name in ("tokenizer", "out", "image_size")
               if getattr(options, name) is None]  # fmt: skip
    if missing:
        raise ConfigError(f"mar cache needs {', '.join(missing)} too, or --verify to check a cache that is there")
    if options.batch < 1 or options.workers < 0:
        raise ConfigError(f"batch {options.batch}, workers {options.workers}: expected at least 1 and 0")


def _verify(options: CacheOptions, check: Callable[[], None]) -> int:
    from mar.checkpoint.files import size_text
    from mar.data.latent_cache import is_cache, read_manifest, verify
    from mar.sampling.progress import meter

    folder = Path(options.data)
    if not is_cache(folder):
        raise ConfigError(f"{folder} is not a cache that `mar cache` made")
    with meter(True, read_manifest(folder).pictures) as progress:

        def advance(pictures: float) -> None:
            check()
            progress(pictures)

        verified = verify(folder, advance)
    size = size_text(sum(verified.index.sizes))
    print(f"{folder} is as it was written: {len(verified):,} pictures, {size} in {verified.manifest.shards} shards")
    return 0


def _cache(options: CacheOptions, check: Callable[[], None]) -> int:
    from mar import distributed
    from mar.data.cache_writer import finish_cache

    out = options.out
    assert out is not None
    with distributed.process_group(options.device) as device:
        source, tokenizer, about, shards = _prepared(options, out)
        if shards is None:
            if distributed.rank() == 0:
                print(f"{out} is finished: {about.pictures:,} pictures; nothing to do")
            return 0
        begun = time.perf_counter()
        _make(options, about, shards, (source, tokenizer, device), check)
        distributed.barrier()
        with distributed.collective_errors():
            if distributed.rank() == 0:
                skipped = finish_cache(out, about)
                _report(out, about, skipped, sum(len(about.span(k)) for k in shards), time.perf_counter() - begun)
    return 0


def _prepared(options: CacheOptions, out: Path) -> tuple[Source, Tokenizer, CacheManifest, list[int] | None]:
    """Open source and tokenizer, and list the shards that are missing, on rank 0 for all."""
    from mar import distributed
    from mar.data.cache_writer import describe_cache, prepare_cache
    from mar.data.sources import open_source
    from mar.zoo import load_tokenizer

    assert options.tokenizer is not None
    assert options.image_size is not None
    prepared: tuple[CacheManifest, list[int] | None] | None = None
    with distributed.collective_errors():
        source = open_source(options.data, options.split)
        name = options.tokenizer
        tokenizer = load_tokenizer(name, resolve_image_channels(options.data))
        side = options.image_size
        if distributed.rank() == 0:
            about = describe_cache(
                source, tokenizer, data=options.data, tokenizer_name=name, dtype=options.dtype,
                size=(side, side) if isinstance(side, int) else side, flip=options.flip, shard=options.shard,
            )  # fmt: skip
            prepared = about, prepare_cache(out, about)
    about, shards = distributed.all_gather_object(prepared)[0]
    return source, tokenizer, about, shards


def _make(
    options: CacheOptions, about: CacheManifest, shards: Sequence[int],
    parts: tuple[Source, Tokenizer, torch.device], check: Callable[[], None],
) -> None:  # fmt: skip
    """Makes this process's share of the shards."""
    from mar import distributed
    from mar.data.cache_writer import write_shards
    from mar.sampling.progress import rank_meter

    source, tokenizer, device = parts
    assert options.out is not None
    mine = shards[distributed.rank() :: distributed.world_size()]
    share, to_do = (sum(len(about.span(k)) for k in some) for some in (mine, shards))
    with rank_meter(share, about.pictures, about.pictures - to_do, check) as advance:
        write_shards(
            options.out, about, source, tokenizer, mine, device=device, batch=options.batch, workers=options.workers,
            advance=advance,
        )  # fmt: skip


def _report(out: Path, about: CacheManifest, skipped: dict[int, str], made: int, seconds: float) -> None:
    from mar.checkpoint.files import size_text
    from mar.data.latent_cache import LatentSource

    size = sum(LatentSource(out).index.sizes)
    what = "plain and flipped" if about.flips else "not flipped"
    if skipped:
        shown = ", ".join([*skipped.values()][:3]) + (", ..." if len(skipped) > 3 else "")
        print(f"{len(skipped)} pictures could not be read and are left out: {shown}", file=sys.stderr)
    print(f"{about.pictures - len(skipped):,} pictures in {out}, {what}, {about.dtype}")
    print(f"{size_text(size)}, {size / about.pictures:,.0f} bytes a picture; {made / seconds:.1f} pictures a second")
