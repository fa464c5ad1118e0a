"""Print lines on stdout and stderr: names can't command a terminal, and readers may leave.

Every line of mar is printed by `print_out` or `print_err`, or logged. Other packages print through `guarded` streams.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

_SPACES_AND_JOINERS = "\u00a0\u202f\u3000\u200c\u200d"
"""Characters that Python calls unprintable, and that words and emoji need."""
_PLAIN = str.maketrans(
    {"×": "x", "→": "->", "←": "<-", "…": "...", "–": "-", "—": "-", "·": "-", "±": "+-", "•": "*"}
    | {"│": "|", "┃": "|", "─": "-", "━": "-", "═": "=", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "é": "e"}
)
"""Letters of our own lines where the terminal has ASCII alone."""


def printable(text: str) -> str:
    """Return text with escapes for what terminals obey: controls, line ends, bidi."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _SPACES_AND_JOINERS else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def printable_html(text: str) -> str:
    """Return text for HTML, escaped by `printable` too."""
    import html

    return html.escape(printable(text))


def print_out(*lines: str) -> None:
    """Print lines of a result on stdout, escaped by `printable`."""
    _print(sys.stdout, lines)


def print_err(*lines: str) -> None:
    """Print lines for people on stderr, escaped by `printable`."""
    _print(sys.stderr, lines)


def _print(stream: Any, lines: tuple[str, ...]) -> None:
    text = "".join(f"{printable(line)}\n" for line in lines)
    print(_encodable(text, stream), end="", file=stream, flush=True)


def _encodable(text: str, stream: Any) -> str:
    """Return text that the stream's encoding has letters for."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
        return text
    except (UnicodeEncodeError, LookupError):
        return text.translate(_PLAIN).encode("ascii", "backslashreplace").decode("ascii")


# ---- guarded streams


class _Closed(io.StringIO):
    """Stands for a stream that the process was started without."""


class _Output:
    """A stream that survives its reader.

    Once writing fails, it writes nothing more and keeps the error. Text that its encoding lacks is escaped.

    Args:
        stream: where text goes; None: the process has no such stream.
        escape: escape control characters other than tabs and line ends.
        whole: the output that shares its errors.
        tty: whether it may be a terminal.
    """

    def __init__(self, stream: Any, *, escape: bool, whole: _Output | None = None, tty: bool = True) -> None:
        self.stream = _Closed() if stream is None else stream
        self.escape, self.whole, self.tty = escape, whole or self, tty
        self.error: OSError | ValueError | None = None

    @property
    def unescaped(self) -> _Output:
        """The same output for programs that move the cursor: progress bars, colored help."""
        return _Output(self.stream, escape=False, whole=self.whole) if self.escape else self

    def write(self, text: str) -> int:
        """Write text. Returns its length, whatever happens."""
        clean = _escape_lines(text) if self.escape else text
        if text and self.whole.error is None:
            try:
                if isinstance(self.stream, _Closed):
                    raise OSError(errno.EBADF, "it is closed")
                self.stream.write(_encodable(clean, self.stream))
            except (OSError, ValueError) as error:
                self._fail(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered."""
        if self.whole.error is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._fail(error)

    def isatty(self) -> bool:
        """Return whether a person sees it."""
        try:
            return self.tty and bool(self.stream.isatty())
        except ValueError:  # closed
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _fail(self, error: OSError | ValueError) -> None:
        self.whole.error = error
        if self.stream in (sys.__stdout__, sys.__stderr__):
            # What is buffered would fail again as the interpreter ends.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)


def _escape_lines(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def unescaped(stream: Any) -> Any:
    """Return the output for a progress bar, which moves the cursor."""
    return getattr(stream, "unescaped", stream)


def for_help(stream: Any) -> Any:
    """Return the output for help, colored on terminals unless NO_COLOR is set."""
    if not os.environ.get("NO_COLOR"):  # tyro knows TERM alone
        return unescaped(stream)
    return _Output(stream.stream, escape=True, whole=stream.whole, tty=False) if isinstance(stream, _Output) else stream


class Output:
    """Result of a block of `guarded`: what became of stdout."""

    problem: str | None = None
    """Why results could not be written; None: they were, or the reader has left."""


@contextlib.contextmanager
def guarded() -> Iterator[Output]:
    """Keeps errors of printing from ending the block; the log is escaped too.

    A reader that leaves ends nothing: the work goes on, and the rest is not printed.
    """
    if isinstance(sys.stdout, _Output):
        yield Output()
        return
    _occupy_descriptors()
    before, result = (sys.stdout, sys.stderr), Output()
    stdout, stderr = (_Output(stream, escape=True) for stream in before)
    handler, formatter = logging.lastResort, logging.lastResort.formatter if logging.lastResort else None
    if handler is not None:
        handler.setFormatter(LogFormatter())
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield result
    finally:
        stdout.flush()
        stderr.flush()
        sys.stdout, sys.stderr = before
        if handler is not None:
            handler.setFormatter(formatter)
        if stdout.error is not None and not isinstance(stdout.error, BrokenPipeError):
            result.problem = getattr(stdout.error, "strerror", None) or str(stdout.error)


def _occupy_descriptors() -> None:
    """Keep files from getting the numbers of closed standard streams."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)


class LogFormatter(logging.Formatter):
    """Formats a record in one line, escaped by `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message, with a traceback below if there is one."""
        return printable(record.getMessage()) + "".join(
            f"\n{line}" for line in (self.formatException(record.exc_info).splitlines() if record.exc_info else ())
        )
