"""Check and measure everything on a GPU within fifteen minutes.

    python benchmarks/gpu.py --out OUT                             the first call: 450 seconds, steps by value
    python benchmarks/gpu.py --out OUT --left-out --budget 200     the second: what failed or was left out
    python benchmarks/gpu.py --out OUT --only sampling-base        chosen steps
    python benchmarks/gpu.py --out OUT --train fashion --minutes 5 train a recipe for a stated time, and export it
    python benchmarks/gpu.py --out OUT --rehearse                  all of it at tiny sizes, on a CPU

Each step is a process with a time limit. A step that fails is noted, with what it had measured until then, and the next
one begins. After each step OUT has gpu.json (the record), gpu.md (a table) and gpu.log (all output). A figure of
`--rehearse` says nothing about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

RESULT = "RESULT "
"""Begins a line of a step's output that holds a result; what was printed before a step was stopped counts."""
MIN_SECONDS = 8.0
"""A step is left out if less time than this is left."""
REHEARSAL = 20
"""A rehearsal may take so many times the limits: a CPU may be slow and busy."""
TAIL = 1500
"""Characters of a failed step's output in the record."""
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    options = parse()
    if options.step:
        return run_step(options)
    if not options.rehearse and options.device != "cpu" and not has_cuda():
        print("got no CUDA device, expected one; --rehearse runs all of it at tiny sizes on a CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.train:
        names = ["train"]
        limits = {"train": 60 * options.minutes + 90}  # opening the run, compiling, exporting
        options.budget = max(options.budget, limits["train"])
    else:
        slow = REHEARSAL if options.rehearse else 1
        limits = {name: step.seconds * slow for name, step in steps().items() if name != "train"}
        names = options.only or [*limits]
    report = read_report(options.earlier or options.out / "gpu.json") if (options.left_out or options.only) else {}
    if options.left_out:
        names = [name for name in names if report.get(name, {}).get("status") != "done"]
    print(f"{len(names)} steps in {options.budget:.0f} s: {', '.join(names)}", flush=True)

    begun = time.monotonic()
    for name in names:
        left = options.budget - (time.monotonic() - begun)
        if left < MIN_SECONDS:
            report[name] = {**report.get(name, {"results": {}}), "status": "left out", "why": "no time was left"}
        else:
            report[name] = start_step(options, name, min(limits[name], left - 2))
        write_report(report, options)
        print(f"{name}: {report[name]['status']}, {report[name].get('seconds', 0):.1f} s", flush=True)
    return 0 if all(report[name]["status"] == "done" for name in names) or not options.strict else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default: runs/gpu)")
    parser.add_argument("--budget", type=float, help="seconds for all steps (default: 450; to rehearse 9000)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help=f"steps to run, of: {', '.join(steps())}")
    parser.add_argument("--left-out", action="store_true", help="run what failed or was left out in the earlier call")
    parser.add_argument("--earlier", type=Path, help="gpu.json of an earlier call (default: the one in OUT)")
    parser.add_argument("--device", default="auto", help="auto (CUDA, but the CPU to rehearse), cuda, cuda:N or cpu")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes")
    parser.add_argument("--fork", action="store_true", help="fork steps from one process: quicker; not with CUDA")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a step is not done")
    parser.add_argument("--train", metavar="RECIPE", help="train a recipe of `mar train` for --minutes, and export it")
    parser.add_argument("--minutes", type=float, default=5.0, help="minutes of --train (default: 5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of --train (default: bf16)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of --train's recipe")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.budget is None:
        options.budget = 450.0 * (REHEARSAL if options.rehearse else 1)
    if options.fork and not options.rehearse:
        parser.error("--fork is for --rehearse: CUDA does not work in forks")
    unknown = [name for name in options.only or () if name not in steps() or name == "train"]
    if unknown:
        parser.error(
            f"--only: got {', '.join(unknown)}, expected some of {', '.join(steps())}; train is --train RECIPE"
        )
    if not options.minutes > 0 or not options.budget > 0:
        parser.error(f"got --minutes {options.minutes:g} and --budget {options.budget:g}, expected positive numbers")
    return options


def steps() -> dict[str, Any]:
    """Return all steps by name, by value."""
    from gpu_steps import STEPS

    return STEPS


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# ---- in the process that was called


def start_step(options: argparse.Namespace, name: str, limit: float) -> dict[str, Any]:
    """Run a step in a process of its own, with all of its children; return its part of the record."""
    command = [sys.executable, __file__, "--step", name, "--seconds", f"{limit:.1f}", "--out", str(options.out)]
    command += ["--device", options.device, *(["--rehearse"] if options.rehearse else [])]
    if options.train:
        command += ["--train", options.train, "--minutes", str(options.minutes), "--precision", options.precision]
        command += ["--set", *options.set]
    folders = [str(ROOT / name) for name in ("src", "tests", "benchmarks")]
    paths = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    log_path = options.out / "gpu.log"
    with open(log_path, "ab") as log:
        log.write(f"\n==== {name}, {limit:.0f} s\n".encode())
        log.flush()
        first = log.tell()
        if options.fork:
            code = wait_for_fork(fork_step(options, name, limit, log.fileno()), limit)
        else:
            code = wait_for_command(command, environment, log, limit)
    output = log_path.read_bytes()[first:].decode(errors="replace")
    record: dict[str, Any] = {
        "status": "done" if code == 0 else f"stopped at {limit:.0f} s" if code is None else "failed",
        "seconds": round(time.monotonic() - begun, 1),
        "results": {},
    }
    for line in output.splitlines():
        if line.startswith(RESULT):
            record["results"] |= json.loads(line.removeprefix(RESULT))
    if code != 0:
        text = "\n".join(line for line in output.splitlines() if not line.startswith(RESULT))
        record["why"] = text[-TAIL:].strip()
    return record


def wait_for_command(command: list[str], environment: dict[str, str], log: Any, limit: float) -> int | None:
    """Run a command until it ends, and end whatever it has started. Returns its exit code, None at the limit.

    Args:
        command, environment: of the process.
        log: file for its output.
        limit: seconds.
    """
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        stop_group(process.pid)
        process.wait()


def fork_step(options: argparse.Namespace, name: str, limit: float, log: int) -> int:
    """Fork a process that runs a step, with its output in a file. Returns its number.

    Args:
        options: of this process.
        name: of the step.
        limit: seconds.
        log: descriptor of the file.
    """
    import gpu_steps  # noqa: F401 (imported once, before the fork)

    if number := os.fork():
        return number
    code = 1
    try:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        run_step(argparse.Namespace(**{**vars(options), "step": name, "seconds": limit}))
        code = 0
    except BaseException:  # noqa: BLE001 (what the step's own process would print)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for_fork(number: int, limit: float) -> int | None:
    """Wait for a forked step. Returns its exit code, None at the limit."""
    deadline = time.monotonic() + limit
    while True:
        ended, status = os.waitpid(number, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            stop_group(number)
            os.waitpid(number, 0)
            return None
        time.sleep(0.02)


def stop_group(number: int) -> None:
    """End the processes of a step."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)


def read_report(path: Path) -> dict[str, Any]:
    """Read the record of an earlier call; empty without one."""
    return dict(json.loads(path.read_text(encoding="utf-8"))["steps"]) if path.is_file() else {}


def write_report(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Write record and table, each whole at any time."""
    kind = "rehearsed at tiny sizes: no figure says anything about speed" if options.rehearse else "measured"
    head = {"written": time.strftime("%Y-%m-%d %H:%M:%S"), "kind": kind}
    replace_file(options.out / "gpu.json", json.dumps({**head, "steps": report}, indent=1) + "\n")
    lines = [f"{head['written']}, {kind}", "", "| step | what | found |", "| --- | --- | --- |"]
    for name, record in report.items():
        seconds = f", {record['seconds']} s" if "seconds" in record else ""
        lines.append(f"| {name} | | {record['status']}{seconds} |")
        lines += [f"| | {what} | {as_cell(found)} |" for what, found in record["results"].items()]
        if "why" in record:
            last = record["why"].splitlines()[-1:] or [""]
            lines.append(f"| | why | {last[0][:300].replace('|', '/')} |")
    replace_file(options.out / "gpu.md", "\n".join(lines) + "\n")


def replace_file(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def as_cell(found: Any) -> str:
    """Format a result for the table."""
    if isinstance(found, dict):
        return ", ".join(f"{name} {as_cell(value)}" for name, value in found.items())
    if isinstance(found, float):
        return f"{found:.4g}"
    return str(found).replace("|", "/").replace("\n", " ")


# ---- in the process of a step


def run_step(options: argparse.Namespace) -> int:
    from gpu_steps import Bench

    steps()[options.step].run(Bench(device_name(options.device, options.rehearse), options))
    return 0


def device_name(name: str, rehearse: bool) -> str:
    """Return the device by name; `auto` is CUDA where there is one, but the CPU to rehearse."""
    if name != "auto":
        return name
    return "cuda" if has_cuda() and not rehearse else "cpu"


if __name__ == "__main__":
    sys.exit(main())
