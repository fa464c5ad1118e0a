"""Run `mar tokenizer train` and `mar tokenizer stats`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mar.cli.options import parse
from mar.config import resolve_image_channels
from mar.config.tokenizer import NEW_RUN, TokenizerTrainConfig
from mar.terminal import print_err, print_out

if TYPE_CHECKING:
    from mar.tokenizer import Tokenizer
    from mar.tokenizer.base import RoundTrip
    from mar.training.page import Page
    from mar.training.tokenizer import TokenizerRun


@dataclass(frozen=True)
class TokenizerOptions:
    """Measures a tokenizer's latents, and saves mean and standard deviation with it."""

    action: Annotated[Literal["stats"], tyro.conf.Positional]
    tokenizer: Annotated[str, tyro.conf.Positional]
    """pixels, or a folder or Hub repository in diffusers' format."""
    data: str
    """fashion, a folder of pictures, Parquet or .tar (WebDataset) files, or OWNER/NAME on the Hub."""
    image_size: int | tuple[int, int] | None = None
    """Pictures are cut to squares of so many pixels, or to HEIGHT WIDTH; may be left out where the tokenizer knows one
    size only."""
    per_channel: bool = False
    """One mean and standard deviation for each channel, instead of one for all."""
    limit: int | None = None
    """Number of pictures to measure on; by default all."""


@dataclass(frozen=True)
class TokenizerTrainOptions:
    """Trains a tokenizer on pictures, for `mar train --tokenizer OUT`. The same command resumes."""

    out: Path = Path("runs/tokenizer")
    """Folder of the run; at its end, of the tokenizer."""
    config: Annotated[TokenizerTrainConfig, tyro.conf.arg(name="")] = field(default_factory=TokenizerTrainConfig)
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@dataclass(frozen=True)
class _Out:
    out: Path = Path("runs/tokenizer")


USAGE = """\
usage: mar tokenizer train DATA --out FOLDER [OPTIONS]      a tokenizer of your own, from your pictures
       mar tokenizer stats TOKENIZER --data DATA ...        mean and standard deviation of a tokenizer's latents

mar tokenizer train --help and mar tokenizer stats --help list all options
"""


def tokenizer(arguments: Sequence[str]) -> int:
    """Runs `mar tokenizer train` or `mar tokenizer stats`."""
    if list(arguments) in (["-h"], ["--help"]):
        print_out(*USAGE.splitlines())
        raise SystemExit(0)
    if arguments and arguments[0] == "train":
        return _train(arguments[1:])
    if not arguments or arguments[0] != "stats":
        got = repr(arguments[0]) if arguments else "nothing"
        raise ValueError(f"got {got} after `mar tokenizer`, expected train or stats")
    return _stats(arguments)


def _stats(arguments: Sequence[str]) -> int:
    options = parse(TokenizerOptions, "tokenizer", arguments)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit: got {options.limit}, expected at least 1")
    from mar import zoo
    from mar.checkpoint.files import check_writable
    from mar.checkpoint.tokenizers import save_statistics
    from mar.data.images import Transform
    from mar.data.loader import in_order
    from mar.data.sources import open_source
    from mar.tokenizer.base import measure_latents

    if Path(options.tokenizer).is_dir():
        check_writable(Path(options.tokenizer), is_file=False)
    source = open_source(options.data)
    measured = zoo.load_tokenizer(options.tokenizer, resolve_image_channels(options.data))
    size = _image_size(options.image_size, measured)
    transform = Transform(size, measured.image_channels)
    statistics = measure_latents(
        measured, in_order(source, transform, limit=options.limit), per_channel=options.per_channel
    )
    for name, values in (("mean", statistics.mean), ("std", statistics.std)):
        print_out(f"{name} {' '.join(f'{value:.6g}' for value in values)}")
    most = len(source) if options.limit is None else min(options.limit, len(source))
    left_out = f" of {most:,}: the others can't be read" if statistics.images < most else ""
    print_out(f"measured on {statistics.images:,} pictures{left_out}")
    if Path(options.tokenizer).is_dir():
        measured.set_statistics(statistics.mean, statistics.std)
        print_out(f"kept in {save_statistics(measured, options.tokenizer)}")
    return 0


def _image_size(given: int | tuple[int, int] | None, tokenizer: Tokenizer) -> tuple[int, int]:
    """Returns height and width of images for a tokenizer, as a user gave them or the only ones that it knows."""
    size = tokenizer.fixed_size if given is None else (given, given) if isinstance(given, int) else given
    if size is None:
        raise ValueError("--image-size is missing: the tokenizer takes pictures of many sizes; give the model's")
    if expected := tokenizer.unfit(*size):
        raise ValueError(f"--image-size: got {size[0]}x{size[1]}, expected {expected}")
    return size


def _train(arguments: Sequence[str]) -> int:
    named = bool(arguments) and not arguments[0].startswith("-")
    rest = arguments[1:] if named else arguments
    config = TokenizerTrainConfig(arguments[0]) if named else TokenizerTrainConfig()
    default = TokenizerTrainOptions(config=replace(config, **_begun_settings(rest)))
    if "-h" in rest or "--help" in rest:
        print_out("mar tokenizer train DATA --out FOLDER ...", "")
    options = parse(TokenizerTrainOptions, "tokenizer train", rest, default)
    code = train_tokenizer(options)
    if not code:
        from mar.training.tokenizer import train_command

        print_out(f"train on it: {shlex.join(train_command(options.config, options.out))}")
    return code


def _begun_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that a begun run keeps by default, or those of a new one."""
    from mar.training.run import load_config

    words = [word for word in arguments if word not in ("-h", "--help")]  # whose help is that of all options
    begun = load_config(TokenizerTrainConfig, parse(_Out, "tokenizer train", words, partly=True).out)
    return NEW_RUN if begun is None else {name: getattr(begun, name) for name in NEW_RUN}


def train_tokenizer(options: TokenizerTrainOptions, page: Page | None = None) -> int:
    """Trains or resumes a tokenizer, and prints its summary.

    The page is that of a command with further steps; by default the run has its own.
    Returns the exit code: 130 after a signal.
    """
    from mar.checkpoint.locks import exclusive

    with exclusive(options.out):
        return _train_tokenizer(options, page)


def _train_tokenizer(options: TokenizerTrainOptions, page: Page | None) -> int:
    from mar import devices
    from mar.checkpoint.files import check_writable
    from mar.training.log import log_accounts, open_log, require_writers
    from mar.training.tokenizer import Evaluation, export_tokenizer, open_tokenizer_run
    from mar.training.trainer import Callback, train

    require_writers(options.config.log_to)
    check_writable(options.out, is_file=False)
    device = devices.choose_device(options.device)
    run = open_tokenizer_run(options.config, options.out, device=device, load_network=load_network)
    log = open_log(run, page)
    try:
        log_accounts(log, run)
        if run.data_note is not None:
            log.note(run.data_note)
        run.callbacks.append(Callback(options.config.sample_every, Evaluation(run, log)))
        finished = train(run, log)
        result = export_tokenizer(run, log) if finished else None
    finally:
        log.close()
    if result is None:
        print_err(f"stopped and saved at {run.progress.images:,} images; the same command goes on")
        return 130
    if log.skipped_images:
        print_err(f"{len(log.skipped_images)} pictures could not be read and were skipped")
    _print_summary(run, *result)
    return 0


def load_network() -> Any:
    """Returns EfficientNet-Lite0, from the package with its weights."""
    from mar.evaluation.features.efficientnet import efficientnet_lite0

    return efficientnet_lite0().module.network


def _print_summary(run: TokenizerRun, tokenizer: Tokenizer, round_trip: RoundTrip) -> None:
    """Prints PSNR, compression and tokens."""
    height, width = run.config.size
    cells = height // tokenizer.stride, width // tokenizer.stride
    before = height * width * tokenizer.image_channels
    after = cells[0] * cells[1] * tokenizer.channels
    if round_trip.images:
        print_out(f"PSNR {round_trip.psnr:.2f} dB on {round_trip.images:,} held-out pictures")
    print_out(f"{before:,} values in, {after:,} out: {before / after:.1f} times fewer")
    print_out(f"{cells[0] * cells[1]} tokens of {tokenizer.channels} values with --model.patch-size 1")
