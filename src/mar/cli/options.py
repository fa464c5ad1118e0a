"""Parse options with tyro; sampling options, signals and PNGs of all verbs."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from mar.config import ConfigError, Preset, SamplingConfig
from mar.config.fields import RENAMED, field_docs, new_names, renamed_fields
from mar.terminal import for_help, print_err

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mar.pipeline import Pipeline

Options = TypeVar("Options")
Dtype = Literal["fp32", "bf16"]
DrawnDtype = Literal["fp32", "bf16", "int8"]


# ---- parsing


def parse(
    kind: type[Options], verb: str, arguments: Sequence[str], default: Options | None = None, *, partly: bool = False
) -> Options:
    """Parses the options of a verb; --help prints help and exits 0.

    Args:
        kind: Dataclass of the options.
        verb: Name of the verb, for messages.
        arguments: Words of the command line. Old names are taken too.
        default: Defaults of the options; None: those of `kind`.
        partly: Ignore options that `kind` lacks.

    Raises:
        ValueError: An option is unknown or has a wrong value.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    _parsed.kinds.append(kind)
    words, numbers = _rename_flags(kind, arguments, default)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(for_help(sys.stdout)):
            parsed: Any = tyro.cli(  # type: ignore[call-overload]
                kind,
                prog=f"mar {verb}",
                args=words,
                description=inspect.cleandoc(kind.__doc__ or ""),
                return_unknown_args=partly,
                **given,
            )
        options: Options = parsed[0] if partly else parsed
        options = replace(options, **numbers) if numbers else options  # type: ignore[type-var]
        _parsed.options = options
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise ValueError(_one_line(stderr.getvalue(), verb)) from None
    if not partly:
        _clear_leftovers(options)
    return options


def _clear_leftovers(options: Any) -> None:
    """Remove what killed commands left in the folders of all options, and beside their files."""
    from mar.checkpoint.owners import clear_leftovers

    for folder in sorted(set(_folders(options))):
        clear_leftovers(Path(folder))


def _folders(options: Any) -> Iterator[str]:
    """Yield the folders that options name, and those of the files."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from _folders(value)
        for item in value if isinstance(value, tuple) else (value,):
            if not isinstance(item, str | Path):
                continue
            path = str(item).removeprefix("stream:")
            with contextlib.suppress(ValueError):  # text with a zero byte
                if os.path.isdir(path):
                    yield path
                elif isinstance(item, Path) or os.path.isfile(path):
                    yield os.path.dirname(path) or "."


class _Parsed:
    """The kinds of options of this command, and the options themselves, for messages."""

    kinds: ClassVar[list[type]] = []
    options: Any = None
    batch: tuple[str, int] | None = None
    """Option and size of the batches of a step that does not take `batch`."""


_parsed = _Parsed()


def forget_options() -> None:
    """Begins a command: messages name its options alone."""
    _parsed.kinds.clear()
    _parsed.options = _parsed.batch = None


def name_batch(flag: str | None, batch: int = 0) -> None:
    """Says which option the next step's batches follow from, and their size; None: `batch` again."""
    _parsed.batch = None if flag is None else (flag, batch)


def as_typed(message: str) -> str:
    """Returns a message with this command's options as they are typed.

    Fields at its beginning are options; so are, anywhere, those whose names no prose has (`image_size`). Paths and
    quoted text stay as they are.
    """
    flags: dict[str, str] = {}
    pairs = [pair for kind in _parsed.kinds for pair in _flags(kind)]
    for name, flag in sorted(pairs, key=lambda pair: "." in pair[1]):
        flags.setdefault(name, flag)  # those of the verb before those of a part of it
    if not flags:
        return message
    names = _any_of(flags)
    listed = rf"(?:{names})(?:(?:, | and )(?:{names}))*"
    beginning = re.match(rf"{listed}(?=(?: of \S+)?:|(?: (?:is|are|says|needs|of|must)\b))", message)
    end = 0 if beginning is None else beginning.end()
    first = re.sub(rf"\b(?:{names})\b", lambda match: flags[match[0]], message[:end])
    unmistakable = _any_of(name for name in flags if "_" in name and "." not in name)
    loose = rf"(?<![\w./\\'\"`=-])(?:{unmistakable})(?![\w/\\'\"`=-]|\.\w)"
    return first + re.sub(loose, lambda match: flags[match[0]], message[end:])


def _any_of(names: Iterable[str]) -> str:
    """Returns a pattern of any of these names, the longest first."""
    return "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"


def _flags(kind: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yields the fields of a dataclass as messages name them, and as they are typed."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if any(mark is tyro.conf.Positional or mark is tyro.conf.Suppress for mark in marks):
            continue
        if isinstance(inner, type) and is_dataclass(inner):
            is_outer = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _flags(inner, path if is_outer else (*path, name))
            continue
        flag = "--" + ".".join((*path, name)).replace("_", "-")
        for own in {".".join((*path, name)), name} if path in ((), ("model",), ("vae",)) else {".".join((*path, name))}:
            yield own, flag
            yield own.replace("_", "-"), flag


def out_of_memory(verb: str, reason: str) -> str:
    """Returns the message for too little memory: for which input, and what the verb can do about it."""
    options = _parsed.options
    named = [value for name, value in _inputs(options) if name not in ("out", "target")] if options is not None else []
    batch = getattr(options, "batch", None) or getattr(getattr(options, "config", None), "batch", None)
    flag, batch = _parsed.batch or ("--batch", batch)
    work = f"`mar {verb}`" + (f" of {', '.join(named[:2])}" if named else "")
    remedy = "close other programs, or use a machine with more"
    if batch is not None and batch > 1:
        remedy = f"take a smaller {flag} than {batch}"
    elif batch is None and hasattr(options, "dtype") and verb == "convert":
        remedy = "close other programs; --dtype changes the file alone"
    return f"there is not enough memory for {work} ({reason}); {remedy}"


def _inputs(options: Any) -> Iterator[tuple[str, str]]:
    """Yields the files and names among options, positional ones first."""
    names = ("model", "what", "pictures", "data", "source", "paths", "tokenizer", "known", "reference", "init")
    for holder in (options, getattr(options, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, str | Path) and str(each):
                    yield name, str(each)


def _one_line(box: str, verb: str) -> str:
    """Joins the lines of tyro's framed message, without its title and help."""
    lines = [re.sub("-{5,}", "", line.strip(_FRAME)).strip() for line in box.splitlines()]  # without UTF-8, dashes
    _, *lines = [line for line in lines if line and not line.startswith("For full helptext")] or [""]
    lines = list(itertools.takewhile(lambda line: not line.startswith("Argument helptext"), lines))
    lines = [line for line in lines if line != f"mar {verb} --help"]
    text = _missing(lines) if lines and lines[0].startswith("Missing from") else " ".join(lines)
    for pattern, plain in _TYRO_MESSAGES:
        text = pattern.sub(plain, text)
    return f"{text.rstrip('.;') or 'got options that are not understood'}; see `mar {verb} --help`"


def _missing(lines: Sequence[str]) -> str:
    """Lists the options that are missing, each with its help, from the lines of tyro's message."""
    options: list[list[str]] = []
    for line in lines[1:]:
        if line.startswith("--") or line.isupper() or not options:
            options.append([line])
        else:
            options[-1].append(line)
    listed = [f"{name} ({' '.join(words).removesuffix('(required)').rstrip(' .')})" for name, *words in options]
    return f"{lines[0].removeprefix('Missing from ').rstrip(':')} needs {' and '.join(listed)}"


_FRAME = "│╭╮╰╯─ \t"


def _listed(match: re.Match[str]) -> str:
    choices = sorted(set(re.findall(r"'([^']+)'", match[3])) - {"None"})
    return f"{match[2]}: got {match[1]}, expected {', '.join(choices)}"


_TYRO_MESSAGES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"invalid choice (.*?) for argument '(.*?)'\. Expected one of \((.*)\)"), _listed),
    (re.compile(r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)"),
     r"\1: got \2, expected a whole number"),
    (re.compile(r"Error parsing (\S+): could not convert string to float: (.*)"), r"\1: got \2, expected a number"),
    (re.compile(r"Error parsing (\S+): no type matching (.+?) could be instantiated from \[(.*?)\]\. Got errors.*"),
     lambda match: f"{match[1]}: got {match[3]}, expected {re.sub('[{}]', '', match[2].replace('{None}|', ''))}"),
    (re.compile(r"Error parsing (\S+): "), r"\1: "),
    (re.compile(r"^Unrecognized options: ([^\s,]+),? .*?Perhaps you meant: (--\S+).*"),
     r"there is no \1; the nearest is \2"),
    (re.compile(r"Missing value for argument '(.*?)'\. Expected (\d+) values"),
     r"\1: got too few values, expected \2"),
]  # fmt: skip
"""Messages of tyro, and how mar says the same."""


def _rename_flags(kind: type, arguments: Sequence[str], default: Any) -> tuple[list[str], dict[str, float]]:
    """Replaces old names of options, and prints each new name once on stderr.

    An old name may stand for one number of a pair. The pair's default completes it.

    Returns:
        The arguments under new names; and by old name the numbers of pairs without a default.
    """
    words: list[str] = []
    intervals: dict[str, list[str]] = {}
    numbers: dict[str, float] = {}
    rest = iter(arguments)
    for word in rest:
        flag, equals, value = word.partition("=")
        *path, old = flag.removeprefix("--").replace("-", "_").split(".")
        owners = _owners(kind, path, default) if flag.startswith("--") else ()
        owner, config = next((pair for pair in owners if old in renamed_fields(pair[0])), (None, None))
        if owner is None:
            words.append(word)
            continue
        name, _, index = renamed_fields(owner)[old].rstrip("]").partition("[")
        renamed = "--" + ".".join([*path, name]).replace("_", "-")
        for _ in new_names(owner, [old]):
            place = f"number {int(index) + 1} of " if index else ""
            print_err(f"mar: {flag} is now {place}{renamed}; the old name still works")
        if not index:
            words.append(renamed + equals + value)
            continue
        value = value if equals else next(rest, "")
        whole = getattr(config or owner, name)
        if whole is None:
            numbers[old] = _number(value, flag)
        else:
            intervals.setdefault(renamed, [str(number) for number in whole])[int(index)] = value
    return [*words, *(word for flag, pair in intervals.items() for word in (flag, *pair))], numbers


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag}: got {text!r}, expected a number") from None


def _owners(kind: type, path: Sequence[str], default: Any) -> Iterator[tuple[type, Any]]:
    """Yields the dataclasses in `kind` with options --PATH.NAME, and their defaults."""
    if not path:
        yield kind, default
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not isinstance(inner, type) or not is_dataclass(inner):
            continue
        if any(getattr(mark, "name", None) == "" for mark in marks):  # tyro.conf.arg(name=""): options of the outer one
            yield from _owners(inner, path, getattr(default, name, None))
        elif path[:1] == [name]:
            yield from _owners(inner, path[1:], getattr(default, name, None))


# ---- sampling options


def _or_off(number: type[float]) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    """Parses a number or `off`, since tyro treats a typed None as left out."""
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


def _optional(hint: Any, doc: str) -> Any:
    """Returns the type of an option that may be left out, with its help.

    `off` stands for a typed None.
    """
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if type(None) in get_args(hint):
        typed: Any = Annotated[hint | Literal["off"], _or_off(kinds[0])]
        return Annotated[typed, tyro.conf.arg(help=doc, help_behavior_hint="")]
    if get_origin(hint) is Literal:
        metavar = f"{{{','.join(kinds)}}}"
    else:
        metavar = " ".join(kind.__name__.upper() for kind in kinds or [hint])
    return Annotated[hint | None, tyro.conf.arg(help=doc, metavar=metavar, help_behavior_hint="")]


def _sampling_options() -> list[tuple[str, Any, None]]:
    """Lists name, type and default of the sampling options."""
    hints, docs = get_type_hints(SamplingConfig), field_docs(SamplingConfig)
    preset = _optional(Preset, "exact: the model's own settings; balanced, fast: fewer steps of all kinds.")
    suppressed: Any = Annotated[float | None, tyro.conf.Suppress]
    ends = [old for old, new in renamed_fields(SamplingConfig).items() if new.endswith("]")]
    return [
        ("preset", preset, None),
        *((field.name, _optional(hints[field.name], docs[field.name]), None) for field in fields(SamplingConfig)),
        *((old, suppressed, None) for old in ends),  # `parse` sets them
    ]


if TYPE_CHECKING:

    @dataclass(frozen=True, kw_only=True)
    class _SamplingOptions: ...
else:
    _SamplingOptions = make_dataclass("_SamplingOptions", _sampling_options(), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(_SamplingOptions):
    """Options of verbs that sample.

    The preset and the fields of SamplingConfig are None where left out.
    """

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: DrawnDtype | None = None
    """Precision of the model's matrices: by default bf16 on GPUs that multiply in it, else fp32. int8, on CPUs, is
    faster, less exact, and depends on the batch."""
    tf32: bool = False
    """Round inputs of float32 products to TF32 on GPUs: faster, less exact."""
    allow_broken: bool = False
    """Keep broken pictures instead of stopping with an error."""

    def settings(self) -> dict[str, Any]:
        """Returns the given options, as keywords of `Pipeline.sampling_with`."""
        given = {field.name: getattr(self, field.name) for field in fields(_SamplingOptions)}
        return {name: None if value == "off" else value for name, value in given.items() if value is not None}

    def load(self, model: str, device: torch.device | None = None) -> Pipeline:
        """Loads a model in the precision of the options; `device` overrides theirs."""
        from mar import devices
        from mar.zoo import load

        device = device or devices.choose_device(self.device)
        return load(model, device=device, dtype=devices.torch_dtype(self.resolved_dtype(device)), tf32=self.tf32)

    def resolved_dtype(self, device: torch.device) -> DrawnDtype:
        """Returns the precision that is drawn in on a device."""
        from mar.devices import default_precision

        return self.dtype or default_precision(device)


def _read_size(words: list[str]) -> tuple[int, int]:
    """Reads 256, 256x512, or 256 512: height and width."""
    try:
        numbers = [int(number) for word in words for number in word.lower().split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"got {' '.join(words)!r}, expected PIXELS or HEIGHTxWIDTH, as 256x512")
    return numbers[0], numbers[-1]


_SIZE = tyro.constructors.PrimitiveConstructorSpec[Any](
    nargs=(1, 2),
    metavar="HEIGHTxWIDTH",
    instance_from_str=_read_size,
    is_instance=lambda value: value is None or isinstance(value, tuple),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True, kw_only=True)
class SizeFlag:
    """Option of verbs that draw pictures of another size."""

    image_size: Annotated[tuple[int, int] | None, _SIZE, tyro.conf.arg(help_behavior_hint="")] = None
    """Experimental: height and width in pixels, or one number for a square, where they are not those of training.
    Positions are interpolated, and pictures get worse."""

    def at_size(self, model: Pipeline) -> Pipeline:
        """Returns the model at the size of the option; without it, the model itself."""
        return model if self.image_size is None else model.at_size(self.image_size)


RENAMED["SamplingFlags"] = RENAMED["SamplingConfig"]


def given_prompts(prompt: Sequence[str] = (), file: Path | None = None) -> list[str | None] | None:
    """Returns the prompts of --prompt or --prompts; None: neither was given.

    Raises ConfigError for both, and for a file without prompts.
    """
    from mar.sampling.plan import read_prompts

    if prompt and file is not None:
        raise ConfigError("got --prompt and --prompts, expected one of them")
    if file is not None:
        return read_prompts(file)
    return [None if text.strip().lower() in ("", "none") else _utf8(text) for text in prompt] or None


def given_labels(labels: Sequence[str]) -> list[str | None] | None:
    """Returns the labels of --labels; None: none were given. Raises ConfigError for an empty one."""
    if any(not label.strip() for label in labels):
        raise ConfigError("--labels: got '', expected numbers or names of classes, or none")
    return [None if label.lower() == "none" else _utf8(label) for label in labels] or None


def _utf8(word: str) -> str:
    """Returns a word of the command line as UTF-8, where the locale took it for ASCII."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word


def check_asks(model: Pipeline, labels: Sequence[str | None] | None, prompts: Sequence[str | None] | None) -> None:
    """Raises ValueError for labels or prompts that a model can't draw.

    Args:
        model: draws them.
        labels: given by the user; None: none were.
        prompts: given by the user; None: none were.
    """
    if labels is not None and prompts is not None:
        raise ConfigError("got labels and prompts, expected one of them")
    if labels is not None or prompts is not None:
        model.reader.validate(labels, prompts)


def default_prompts(model: Pipeline) -> list[str | None]:
    """Prints and returns the prompts to draw by default."""
    from mar import distributed

    if distributed.rank() == 0:
        kind = "the model's examples" if model.examples else "pictures without a condition"
        print_err(f"mar: no prompts were given: drawing {kind}; --prompt says what to draw")
    return list(model.examples) or [None]


# ---- signals and files


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Raises KeyboardInterrupt on SIGTERM, as on Ctrl-C; ignores further signals.

    Yields a function that raises it again: a callback that can't raise may have lost the first one.
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
    """Runs a verb; signals end it with exit code 130.

    Ctrl-C and SIGTERM print one line, which ends with `note`. torch may be half imported then: importing it again would
    crash.
    """
    with stoppable() as check:
        try:
            return run(check)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":  # `mar.distributed.rank`
                print_err(f"mar: stopped; {note}")
            return 130


def save_png(image: Image.Image, path: Path, **facts: Any) -> None:
    """Writes a PNG atomically, with `facts` as JSON in its metadata.

    Their key is `mar`.
    """
    from PIL.PngImagePlugin import PngInfo

    from mar.checkpoint.files import write_atomically

    info = PngInfo()
    info.add_text("mar", json.dumps(facts))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))
