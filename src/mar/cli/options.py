"""What verbs share: parsing by tyro, device and precision, and writing pictures."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from mar.config import GuidanceSchedule, MaskSchedule, Order, Preset, SamplingConfig, Solver, TimestepSpacing

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mar.pipeline import Pipeline

Options = TypeVar("Options")
Dtype = Literal["fp32", "bf16"]
DrawnDtype = Literal["fp32", "bf16", "int8"]


def _or_off(number: type[float]) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """How a number, or `off`, is read: a None that is typed would be taken for a flag that was left out."""
    kind = number.__name__.upper()

    def read(words: list[str]) -> float | str:
        try:
            return "off" if words == ["off"] else number(words[0])
        except ValueError:
            raise ValueError(f"got {words[0]!r}, expected {kind} or off") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind}|off",
        instance_from_str=read,
        is_instance=lambda value: value in (None, "off") or isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How pictures are drawn, for every verb that draws. What is None is the preset's, or the model's own default."""

    preset: Preset | None = None
    """exact: the model's own settings; balanced, fast: fewer steps of all kinds. Flags beside it have the last word."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 is none."""
    guidance_schedule: GuidanceSchedule | None = None
    """linear: rises to the scale as tokens are revealed; constant."""
    steps: int | None = None
    """K: reveal steps."""
    diffusion_steps: int | None = None
    """Diffusion steps for each token."""
    temperature: float | None = None
    """Factor of the noise of each diffusion step; of the first noise for solvers that add none."""
    x0_bound: Annotated[float | Literal["off"] | None, _or_off(float)] = None
    """Clip predicted tokens to this many standard deviations: for young models; off: not at all."""
    solver: Solver | None = None
    """ancestral; in fewer diffusion steps dpm++2m-sde, and without noise on the way ddim, dpm++2m, dpm++2s."""
    spacing: TimestepSpacing | None = None
    """Of diffusion timesteps: even in time, or in log-snr."""
    diffusion_steps_end: Annotated[int | Literal["off"] | None, _or_off(int)] = None
    """Diffusion steps at the last reveal step, linear in between; off: the same number throughout."""
    noisiest: float | None = None
    """Where diffusion starts, as a share of the trained timesteps: 0.95 skips the noisiest."""
    guidance_from: float | None = None
    """Guide only from the step after which this share of a picture's tokens is known."""
    guidance_until: float | None = None
    """Guide only up to the last step after which no more than this share is known."""
    guidance_refresh: int | None = None
    """Run the trunk without the class at every so many guided steps only."""
    reveal_schedule: MaskSchedule | None = None
    """cosine; exponential: slower at first."""
    order: Order | None = None
    """Of a picture's tokens: random, checkerboard first, halton."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: DrawnDtype = "fp32"
    """Precision of the model's matrices; int8, on CPUs: sooner, less exact, and depending on the batch."""
    tf32: bool = False
    """Let GPUs round inputs of float32 products to TF32: faster, and less exact."""
    allow_broken: bool = False
    """Take pictures even where the latents are no pictures, instead of saying why."""

    def settings(self) -> dict[str, Any]:
        """What `Pipeline.sampling_with` is to be told: the preset, and the fields of SamplingConfig that were set."""
        names = ("preset", *(field.name for field in fields(SamplingConfig)))
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {name: None if value == "off" else value for name, value in given.items()}

    def load(self, model: str, device: torch.device | None = None) -> Pipeline:
        """The model of this name, on `device` (by default the one asked for), in the precision asked for."""
        from mar import devices
        from mar.zoo import load

        if self.tf32:
            devices.allow_tf32()
        return load(model, device=device or self.device, dtype=torch_dtype(self.dtype))


def parse(
    kind: type[Options], verb: str, arguments: Sequence[str], default: Options | None = None, *, partly: bool = False
) -> Options:
    """The options of a verb; `partly`: those that `kind` has, others are left alone.

    Prints help and exits 0 where it is asked for; ValueError for options that can't be.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: Any = tyro.cli(  # type: ignore[call-overload]
                kind,
                prog=f"mar {verb}",
                args=list(arguments),
                description=kind.__doc__,
                return_unknown_args=partly,
                **given,
            )
        options: Options = found[0] if partly else found
        return options
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise ValueError(_one_line(said.getvalue(), verb)) from None


def _one_line(box: str, verb: str) -> str:
    """What tyro frames in a box of several lines, as one."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in box.splitlines()]
    words = [line for line in lines if line and not line.startswith("For full helptext")]
    return f"{' '.join(words) or 'these options can not be understood'}; see `mar {verb} --help`"


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Within, SIGTERM raises KeyboardInterrupt as Ctrl-C does; signals that follow wait until all is put away.

    Yields a function that raises it again, should the first have been lost in a callback that can't raise.
    """
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            raise KeyboardInterrupt

    def check() -> None:
        if stopped:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where signals can't be handled
        yield check
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interruptible(note: str, run: Callable[[Callable[[], None]], int]) -> int:
    """Runs a verb, which Ctrl-C and SIGTERM end in one line that closes with `note`; exit code 130 then.

    They may come while torch is half imported, which must not be asked for again then: it would crash.
    """
    with stoppable() as check:
        try:
            return run(check)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":  # `mar.distributed.rank`
                print(f"mar: stopped; {note}", file=sys.stderr)
            return 130


def torch_dtype(name: DrawnDtype) -> torch.dtype:
    """torch's name of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[name]


def save_png(image: Image.Image, path: Path, **facts: Any) -> None:
    """Writes a PNG, whole or not at all, with `facts` (settings, seeds) as JSON in its metadata under `mar`."""
    from PIL.PngImagePlugin import PngInfo

    from mar.checkpoint.files import write_atomically

    info = PngInfo()
    info.add_text("mar", json.dumps(facts))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))
