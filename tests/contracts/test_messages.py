"""Every verb's lines: whoever reads them may leave, names command no terminal, and messages say what to do."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from PIL import Image
from tiny import tiny_pipeline, write_images

import mar
from mar.cli import VERBS, main
from mar.cli.options import as_typed, forget_options, parse
from mar.cli.sample import SampleOptions
from mar.config import SamplingConfig
from mar.terminal import guarded, print_err, print_out, printable, printable_html, unescaped
from mar.training.page_html import Stage, draw_commands, render

HOSTILE = "cat\x1b[2J\r\n\u202egnp\x07\x9b\u2066\U000e0041"
"""A name that clears screens, turns text around, forges lines and rings."""
ESCAPED = r"cat\x1b[2J\r\n\u202egnp\x07\x9b\u2066\U000e0041"


def run_mar(*arguments: str, stdout: Any) -> subprocess.CompletedProcess[str]:
    """Runs `mar` in a process of its own, as a shell does."""
    return subprocess.run(
        [sys.executable, "-m", "mar", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120,
        check=False,
    )  # fmt: skip


def terminal_of(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def written(stream: io.TextIOWrapper) -> str:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode(stream.encoding)


class Gone(io.StringIO):
    """A stream whose reader has left, or whose disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.gone = error

    def write(self, text: str) -> int:
        raise self.gone


# ---- readers that leave, disks that are full


@pytest.mark.parametrize("arguments", [["--help"], ["info", "fashion"], ["train", "--help"]])
def test_mar_reader_that_left_is_quiet(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    ended = run_mar(*arguments, stdout=write)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["--help"], ["info", "fashion"], ["train", "--help"]])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_mar_full_stdout_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = run_mar(*arguments, stdout=full)
    assert (ended.returncode, ended.stderr) == (2, "mar: can't write to stdout: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_mar_closed_streams_are_no_traceback(closed: str) -> None:
    command = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-m", "mar", "demo", "--bogus"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    expected = "" if "2>" in closed else "mar: Unrecognized options: --bogus; see `mar demo --help`\n"
    assert (ended.stdout, ended.stderr) == ("", expected)


@pytest.mark.parametrize("verb", [*VERBS, "--version"])
def test_verb_help_survives_its_reader(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Gone(BrokenPipeError(32, "Broken pipe")))
    try:
        assert main([verb] if verb.startswith("-") else [verb, "--help"]) == 0
    except SystemExit as stopped:  # tyro's
        assert not stopped.code  # noqa: PT017
    assert capsys.readouterr().err == ""


def test_info_failing_stdout_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", Gone(OSError(5, "Input/output error")))
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "mar: can't write to stdout: Input/output error\n"


def test_sample_without_reader_draws_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "tiny.safetensors"
    tiny_pipeline().save(model)
    monkeypatch.setattr(sys, "stdout", Gone(BrokenPipeError(32, "Broken pipe")))
    monkeypatch.setattr(sys, "stderr", Gone(BrokenPipeError(32, "Broken pipe")))
    assert main(["sample", str(model), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert len([*(tmp_path / "out").glob("*.png")]) == 4


# ---- names that command the terminal


def test_printable_escapes_what_a_terminal_obeys() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("\udcff") == r"\udcff"
    family = "naïve \N{MAN}\u200d\N{WOMAN} \N{NO-BREAK SPACE}日本語 C:\\new"
    assert printable(family) == family


def test_printed_lines_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_out(HOSTILE, "second")
    print_err(HOSTILE)
    said = capsys.readouterr()
    assert said.out == f"{ESCAPED}\nsecond\n"
    assert said.err == f"{ESCAPED}\n"


def test_guarded_streams_escape_what_others_print(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded():
        print(f"a warning of {HOSTILE}", file=sys.stderr)
        unescaped(sys.stdout).write("\x1b[1mbold")
    said = capsys.readouterr()
    assert said.err == "a warning of " + ESCAPED.replace(r"\n", "\n") + "\n"
    assert said.out == "\x1b[1mbold"


def test_source_prints_by_one_function_alone() -> None:
    root = Path(mar.__file__).parent
    calls = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert len(calls) == 1, calls
    assert calls[0].startswith("terminal.py:")


def test_info_hostile_classes_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipeline()
    pipeline.classes = (HOSTILE, "dog", "bird")
    path = tmp_path / f"m{HOSTILE}.safetensors"
    pipeline.save(path)
    for arguments in (["info"], ["verify"], ["sample", "--labels", "wolf", "--out", str(tmp_path / "out")]):
        main([arguments[0], str(path), *arguments[1:]])
        said = capsys.readouterr()
        shown = said.out + said.err
        assert ESCAPED.partition(r"\r")[0] in shown, arguments
        assert all(character.isprintable() or character == "\n" for character in shown)


@pytest.mark.parametrize("verb", [*VERBS])
def test_verb_hostile_arguments_are_escaped(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train"] if verb == "tokenizer" else []
    assert main([verb, *words, f"/nowhere/{HOSTILE}", f"--{HOSTILE}", HOSTILE]) == 2
    said = capsys.readouterr().err
    assert all(character.isprintable() or character == "\n" for character in said)
    assert said.count("\n") == 1


def test_page_hostile_names_are_escaped(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    root = tmp_path / f"<run>{HOSTILE}"
    stage = Stage("model", root, 10, classes=(HOSTILE,))
    page = render(root, [stage], draw_commands(root), datetime(2026, 1, 1, tzinfo=UTC))
    assert f"&lt;run&gt;{ESCAPED}" in page
    assert all(character.isprintable() or character == "\n" for character in page)
    assert printable_html('<b>"\x1b') == r"&lt;b&gt;&quot;\x1b"


# ---- terminals without UTF-8


@pytest.mark.parametrize("verb", [*VERBS])
def test_verb_help_in_ascii(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal_of("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert "--" in written(stream)
    assert "\\x" not in written(stream)
    assert "\\u" not in written(stream)


def test_ascii_terminal_gets_plain_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal_of("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    print_out("Fréchet 3.1 ± 0.2, 4×4, 猫")
    assert written(stream) == "Frechet 3.1 +- 0.2, 4x4, \\u732b\n"


# ---- options as they are typed


def numbers_of(kind: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """Flags of options that take numbers, and how many each takes."""
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from numbers_of(hint, (*path, name))
            continue
        kinds = {hint, *get_args(hint)}
        pairs = [each for each in kinds if get_origin(each) is tuple]
        if kinds & {int, float}:
            yield "--" + ".".join((*path, name)).replace("_", "-"), 1
        elif pairs and set(get_args(pairs[0])) & {int, float}:
            yield "--" + ".".join((*path, name)).replace("_", "-"), len(get_args(pairs[0]))


def said_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """The line of a refused command; None: it was not refused."""
    code = main(arguments)
    err = capsys.readouterr().err
    if not code:
        return None
    assert code == 2
    assert err.count("\n") == 1, err
    return err


def test_sample_misspelled_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert said_of(["sample", "fashion", "--label", "dress"], capsys) == (
        "mar: there is no --label; the nearest is --labels; see `mar sample --help`\n"
    )


def test_verb_missing_options_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Two of one kind, and an option by its help."""
    assert main(["convert"]) == 2
    said = capsys.readouterr().err
    assert "mar convert needs PATH (checkpoint-last.pth, or a file or run folder of ours) and PATH (The file" in said
    assert main(["tokenizer", "stats", "x"]) == 2
    said = capsys.readouterr().err
    assert "needs --data STR (fashion, " in said
    assert "on the Hub); see `mar" in said


def test_sample_mask_without_white_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, black = tmp_path / "m.safetensors", tmp_path / "black.png"
    tiny_pipeline().save(model)
    Image.new("L", (4, 4), 127).save(black)
    arguments = ["sample", str(model), "--known", str(black), "--mask", str(black), "--out", str(tmp_path / "o")]
    said = said_of(arguments, capsys)
    assert said is not None
    assert "black.png has nothing white" in said
    assert not (tmp_path / "o").exists()


def test_sample_every_bad_number_names_the_option_as_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.safetensors"
    tiny_pipeline().save(model)
    refused = set()
    own = ["--count", "--batch"]
    for flag, count in [*numbers_of(SamplingConfig), *((flag, 1) for flag in own)]:
        for value in ("nonsense", "-1"):
            said = said_of(["sample", str(model), "--out", str(tmp_path / "o"), flag, *[value] * count], capsys)
            if said is not None:
                refused.add(flag)
                assert flag in said, said
                assert not re.search(r"[a-z]_[a-z]", said.replace(str(tmp_path), "")), said
    assert {"--steps", "--diffusion-steps", "--guidance-scale", "--start-t", "--x0-bound", *own} <= refused
    assert {flag for flag, _ in numbers_of(SamplingConfig)} <= refused


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sample", "fashion", "--image-size", "0"], "--image-size: got 0x0 pixels"),
        (["sample", "fashion", "--image-size", "9" * 30], "--image-size: got "),
        (["sample", "fashion", "--count", "9" * 30], "--count: got "),
        (["sample", "fashion", "--labels", ""], "--labels: got ''"),
        (["generate", "fashion", "--out", "o", "--labels", ""], "--labels: got ''"),
        (
            ["generate", "fashion", "--out", "o", "--per-class", "2", "--count", "3"],
            "--per-class and --count: got",
        ),
        (["cache", "fashion", "--out", "o", "--tokenizer", "pixels", "--image-size", "0"], "--image-size: got 0x0"),
        (["cache", "fashion", "--out", "o", "--tokenizer", "pixels", "--image-size", "8", "--batch", "0"], "--batch"),
        (["stats", "fashion", "--out", "o.npz", "--batch", "0"], "--batch: got 0"),
        (["stats", "fashion", "--out", "o.npz", "--image-size", "-3"], "--image-size: got -3"),
        (["stats", "fashion", "--out", "o.npz", "--count", "1"], "--count: got 1"),
        (["tokenizer", "stats", "pixels", "--data", "fashion", "--image-size", "0"], "--image-size: got 0"),
        (["train", "fashion", "--batch", "0"], "--batch is 0"),
        (["train", "fashion", "--model.encoder.depth", "0"], "depth is 0"),
        (["train", "fashion", "--log-to", "nothing"], "--log-to: got 'nothing'"),
        (["app", "--port", "0"], "--port: got 0"),
    ],
)
def test_verb_bad_options_are_named_as_typed(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = said_of(arguments, capsys)
    assert said is not None
    assert line in said
    assert not [*tmp_path.iterdir()]


def test_as_typed_leaves_paths_and_words_alone() -> None:
    forget_options()
    assert as_typed("image_size: got 3") == "image_size: got 3"
    parse(SampleOptions, "sample", ["fashion"])
    assert as_typed("image_size: got 3") == "--image-size: got 3"
    assert as_typed("steps and batch: got 1 and 2") == "--steps and --batch: got 1 and 2"
    assert as_typed("/runs/image_size/x.png: there are no steps, batch 3") == (
        "/runs/image_size/x.png: there are no steps, batch 3"
    )
    assert as_typed("m: label_drop 0 fits guidance_scale 1 alone") == "m: label_drop 0 fits --guidance-scale 1 alone"
    assert as_typed("'image_size' and image_size.png") == "'image_size' and image_size.png"
    forget_options()


# ---- memory


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_names_the_input_and_a_remedy_of_the_verb(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr("mar.zoo.load", fail)
    monkeypatch.setattr("mar.zoo.describe", fail)
    said = said_of(["sample", "m.safetensors", "--out", str(tmp_path), "--batch", "7"], capsys)
    assert said is not None
    assert "not enough memory for `mar sample` of m.safetensors" in said
    assert "take a smaller --batch than 7" in said
    main(["info", "m.safetensors"])
    said = capsys.readouterr().err
    assert "not enough memory for `mar info` of m.safetensors" in said
    assert "--batch" not in said


# ---- homes that are not there


@pytest.mark.parametrize("home", [f"{os.devnull}/nobody", "/proc/nobody"])
def test_home_that_is_not_there_is_needed_by_caches_alone(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("MAR_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save("m.safetensors")
    for arguments in (["info", "fashion"], ["models"], ["sample", "m.safetensors", "--out", "o"]):
        assert main(arguments) == 0
        capsys.readouterr()
    assert main(["download", "kl16"]) == 2  # before the first request
    assert capsys.readouterr().err.endswith("; set MAR_HOME to a folder that can be written\n")


def test_home_without_an_entry_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MAR_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", fail)
    assert main(["models"]) == 0
    capsys.readouterr()
    assert main(["cache", "~/pictures", "--out", "o", "--tokenizer", "pixels", "--image-size", "8"]) == 2
    assert capsys.readouterr().err == "mar: there is no home folder for ~: set HOME, or give the whole path\n"


def test_hub_cache_that_cannot_be_written_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", "/locked")

    def fail(*arguments: Any, **named: Any) -> Any:
        try:
            raise PermissionError(13, "Permission denied", "/locked/hub/x")
        except OSError as error:
            raise ValueError("can't get owner/model from the Hub") from error

    monkeypatch.setattr("mar.zoo.load", fail)
    said = said_of(["sample", "owner/model"], capsys)
    assert said == "mar: can't get owner/model from the Hub; set HF_HOME to a folder that can be written\n"


# ---- counts


def test_cache_verify_counts_what_was_cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    write_images(pictures, 5)
    broken = next(pictures.rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:40])
    where = ["--out", str(tmp_path / "c"), "--tokenizer", "pixels", "--image-size", "8", "--device", "cpu"]
    assert main(["cache", str(pictures), *where]) == 0
    assert capsys.readouterr().out.startswith("4 pictures in ")
    assert main(["cache", str(tmp_path / "c"), "--verify"]) == 0
    assert "is as it was written: 4 pictures, 1 left out that could not be read, " in capsys.readouterr().out
