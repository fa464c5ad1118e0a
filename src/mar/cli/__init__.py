"""Run a verb of the command line: `mar VERB`.

A user's mistake is one line on stderr and exit code 2; MAR_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence

from mar import __version__
from mar.terminal import LogFormatter, guarded, print_err, print_out

VERBS = {
    "demo": ("mar.cli.demo", "pictures from the bundled model, and one being revealed"),
    "app": ("mar.cli.app", "the studio: a web page to watch pictures grow, and to paint over them"),
    "sample": ("mar.cli.sample", "draw pictures from a model"),
    "generate": ("mar.cli.generate", "thousands of pictures: PNGs, .npz, WebDataset; any number of processes"),
    "evaluate": ("mar.cli.evaluate", "FID and other metrics, of a model or of pictures; sweeps over settings"),
    "stats": ("mar.cli.stats", "features of real pictures, for evaluate to compare with"),
    "cache": ("mar.cli.cache", "cache a tokenizer's latents of all pictures, for training"),
    "train": ("mar.cli.train", "train a model; the same command resumes"),
    "convert": ("mar.cli.convert", "official weights -> ours, and back"),
    "models": ("mar.cli.models", "the models there are, their figures, and which are on this machine"),
    "download": ("mar.cli.download", "fetch a published model and its tokenizer"),
    "tokenizer": ("mar.cli.tokenizer", "train a tokenizer on your pictures, or measure one"),
    "verify": ("mar.cli.verify", "compare every byte of a run, cache, model or statistics with its checksums"),
    "info": ("mar.cli.info", "this machine, and what a checkpoint holds"),
}

ERROR_GRACE_S = 5.0
"""Seconds that the failing rank has for its message: torchrun ends all ranks as soon as one ends."""

COLUMN_RANGE = 40, 1000
"""Columns of a terminal that text is laid out for: in fewer than six, tyro wraps without end."""

USAGE = """\
mar {version}: image generation with a masked autoregressive transformer and a diffusion loss

usage: mar VERB [OPTIONS]          mar VERB --help lists the options of a verb

{verbs}
"""


def usage() -> str:
    """Returns the text of `mar --help`."""
    verbs = "\n".join(f"  {name:<10} {help}" for name, (_, help) in VERBS.items())
    return USAGE.format(version=__version__, verbs=verbs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code.

    A reader of stdout may leave: the work is done, and its exit code stays. Other errors of stdout fail.
    """
    code: int | SystemExit
    with guarded() as output:
        try:
            code = _main(list(sys.argv[1:] if arguments is None else arguments))
        except SystemExit as stopped:  # --help
            code = stopped
    if output.problem is not None:
        return _fail(f"can't write to stdout: {output.problem}")
    if isinstance(code, SystemExit):
        raise code
    return code


def _main(arguments: list[str]) -> int:
    _bound_columns()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        lines = usage().splitlines()
        if arguments:
            print_out(*lines)
            return 0
        print_err(*lines)
        return 2
    if arguments[0] in ("-V", "--version", "version"):
        print_out(f"mar {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _fail(f"there is no verb {verb!r}; there are {', '.join(VERBS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Spinning threads make a busy machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _show_accounts()
    if "mar.cli.options" in sys.modules:
        sys.modules["mar.cli.options"].forget_options()  # of an earlier command of this process
    return report_errors(lambda: getattr(importlib.import_module(VERBS[verb][0]), verb)(rest), verb)


def _bound_columns() -> None:
    """Set COLUMNS where it, or the terminal, is out of range."""
    columns, (least, most) = shutil.get_terminal_size().columns, COLUMN_RANGE
    if not least <= columns <= most:
        os.environ["COLUMNS"] = str(min(max(columns, least), most))


def _show_accounts() -> None:
    """Print the account of each source at a terminal, if nothing is left out too.

    Programs that read the output get those of left-out items, and errors of one line.
    """
    log = logging.getLogger("mar.data")
    if not log.handlers and sys.stderr.isatty():
        log.setLevel(logging.INFO)
        handler = logging._StderrHandler(logging.INFO)  # type: ignore[attr-defined]  # follows sys.stderr
        handler.setFormatter(LogFormatter())
        log.addHandler(handler)


def report_errors(work: Callable[[], int], verb: str = "") -> int:
    """Runs the work of a verb; prints a user's mistake in one line.

    Returns the exit code.
    """
    try:
        return work()
    except (ValueError, OSError) as error:
        if os.environ.get("MAR_DEBUG"):
            raise
        message = _as_typed(" ".join(str(error).split())) or type(error).__name__
        return _fail(message + _home_hint(error))
    except (RuntimeError, MemoryError) as error:
        if os.environ.get("MAR_DEBUG"):
            raise
        if str(error).startswith("DataLoader worker"):  # raised by a handler of PyTorch, anywhere
            return _fail("a process that reads pictures has ended; run the same command again, with fewer --workers")
        if "determine home directory" in str(error):  # of a path ~/x
            return _fail("there is no home folder for ~: set HOME, or give the whole path")
        if not _is_out_of_memory(error):
            raise
        from mar.cli.options import out_of_memory

        reason = " ".join(str(error).split())[:100] or type(error).__name__
        return _fail(out_of_memory(verb, reason))
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except _other_rank_failed():
        time.sleep(ERROR_GRACE_S)
        return 2


_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)


def _home_hint(error: BaseException | None) -> str:
    """Returns a hint on the variable of a cache, if an error came from writing it."""
    caches = [
        ("MAR_HOME", os.environ.get("MAR_HOME") or "~/.cache/mar"),
        ("HF_HOME", os.environ.get("HF_HOME") or "~/.cache/huggingface"),
    ]
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            path = str(error.filename or "")
            for name, folder in caches:
                if path.startswith((os.path.expanduser(folder), f"{os.devnull}/")):
                    return f"; set {name} to a folder that can be written"
        error = error.__cause__ or error.__context__
    return ""


def _as_typed(message: str) -> str:
    """Returns a message with the options of the verb as they are typed."""
    options = sys.modules.get("mar.cli.options")  # not there yet: nothing was parsed
    return str(options.as_typed(message)) if options else message


def _other_rank_failed() -> type[Exception] | tuple[()]:
    """Returns `distributed.OtherRankFailed`, without importing torch: nothing raises it before that import."""
    module = sys.modules.get("mar.distributed")
    return module.OtherRankFailed if module else ()


def _is_out_of_memory(error: Exception) -> bool:
    """Recognizes torch's errors by name and words: torch may not be imported."""
    words = ("can't allocate memory", "not enough memory")  # of its allocator for CPUs
    by_name = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_name or any(word in str(error) for word in words)


def _fail(message: str, code: int = 2) -> int:
    print_err(f"mar: {message}")
    return code
