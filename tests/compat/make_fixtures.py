"""Make fixtures/v0_1: files of version 0.1, and what that version makes of them.

This runs against version 0.1 alone (the commit is in fixtures/v0_1/README.md), whose names it uses, and is kept to say
how the files came to be. They are never made again by a later version. From a checkout of that commit, in its venv:

    PYTHONPATH=src python THIS_FILE
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import replay
import torch
from PIL import Image

import mar
from mar import runtime
from mar.checkpoint.run_state import RunState
from mar.cli import main
from mar.pipeline import Pipeline
from mar.tokenizer import PCATokenizer, PixelTokenizer
from mar.training import tokenizer as tokenizer_training

JUDGE = '''\
"""A network of exact numbers, for `--features judge.py:judge`. It needs nothing of mar."""

import torch
from torch import nn
from torch.nn import functional


class Judge(nn.Module):
    """Three features of a picture brought to 4x4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.arange(144).view(48, 3) * 37 % 101 - 50) / 128)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return functional.adaptive_avg_pool2d(pixels, 4).flatten(1) @ self.weight


def judge(weights: object = None) -> nn.Module:
    return Judge()
'''

SMALL = """--model.encoder.width 8 --model.encoder.heads 2 --model.encoder.depth 1 --model.encoder.rotary
--model.decoder.width 8 --model.decoder.heads 1 --model.decoder.depth 1 --model.decoder.mlp-ratio 2
--model.head.width 8 --model.head.depth 1 --model.head.batch-mul 2 --model.buffer 3 --model.label-drop 0.2
--sampling.steps 3 --sampling.diffusion-steps 3 --sampling.x0-bound 2 --sampling.guidance 2.5
--sampling.guidance-schedule constant --sampling.guidance-from 0.1 --sampling.guidance-until 0.9
--sampling.guidance-refresh 2 --sampling.spacing log-snr --sampling.noisiest 0.9
--sampling.reveal-schedule exponential --sampling.order halton
--batch 4 --warmup 8 --decay 0 --seed 3 --save-every 1000 --log-every 1 --keep 1 --device cpu --log-to"""
BEGUN, LONGER = "--images 12", "--images 24"
DRAWING = """--guidance 3 --guidance-schedule constant --guidance-from 0.1 --guidance-until 0.8 --guidance-refresh 3
--spacing time --noisiest 0.9 --reveal-schedule cosine --order checkerboard --x0-bound 1.5 --steps 5
--diffusion-steps 4 --diffusion-steps-end 6 --temperature 0.8 --device cpu"""
GENERATE = f"--count 9 --labels ant cat none --seed 4 --batch 2 {DRAWING}"
JUDGED = "--features judge.py:judge --device cpu"
SWEEP = f"""evaluate pixels.safetensors --reference statistics.npz --count 12 --seed 5 --kid --sweep cfg=1,3
--sweep noisiest=0.9 --sweep reveal-schedule=cosine --spacing time --guidance-from 0.2 {JUDGED}"""
CACHE = """cache pictures --tokenizer tokenizer --image-size 16 --dtype fp32 --flip True --shard 10 --batch 4
--device cpu"""

COMMANDS = {
    "run-adamw": f"""train fashion --data pictures --tokenizer pca4 --colours 1 --out run-adamw --model.channels 16
        --model.grid 4 4 --model.patch 2 --model.classes 2 --model.head.prediction x0 --optimizer adamw
        --model.attention-dropout 0.1 --model.projection-dropout 0.1 --recompute selective --ema 0.9 --no-ema-warmup
        --accumulate 2 --clip 1 --shift 1 --flip True --sample-every 12 --validate-every 0 {SMALL} {LONGER}""",
    "run-muon": f"""train fashion --data pictures --out run-muon --model.channels 1 --model.grid 16 16 --model.patch 4
        --model.classes 2 --optimizer muon --muon-factor 2 --recompute full --ema 0.9 --ema-others 0.5 0.99
        --hold-out 5 --patience 3 --validate-every 4 --validate-count 4 --sample-every 0 {SMALL} {LONGER}""",
    "run-folder": f"""train folder --data pictures --tokenizer tokenizer --out run-folder --model.patch 2
        --model.head.path linear --model.head.prediction flow --sample-every 0 --validate-every 0 {SMALL} {LONGER}""",
    "run-stream": f"""train fashion --data stream:shards --out run-stream --model.channels 3 --model.grid 8 8
        --model.patch 4 --model.classes 3 --sample-every 0 --validate-every 0 {SMALL} {LONGER}""",
    "run-init": f"""train fashion --data pictures --init run-muon/model-best.safetensors --out run-init
        --model.channels 1 --model.grid 16 16 --model.patch 4 --model.classes 2 --recompute none --sample-every 0
        --validate-every 0 {SMALL} --images 8""",
    "tokenizer": f"""tokenizer train pictures --out tokenizer --image-size 16 --colours 1 --stride 2 --channels 2
        --width 8 --adversarial 0.5 --adversarial-start 0 --batch 4 --warmup 8 --decay 0 --seed 3 --save-every 1000
        --log-every 1 --keep 1 --sample-every 0 --device cpu {LONGER} --log-to""",
    "cache": f"{CACHE} --out cache",
    "cache_unfinished": f"{CACHE} --out cache-unfinished",
    "cache_verify": "cache cache --verify",
    "cache_train": f"""train fashion --data cache --tokenizer tokenizer --out run-cached --model.channels 2
        --model.grid 8 8 --model.patch 2 --model.classes 2 --sample-every 0 --validate-every 0 {SMALL} {BEGUN}""",
    "sample": f"sample pixels.safetensors --labels ant cat none --count 2 --seed 3 --solver dpm++2m {DRAWING}",
    "generate_png": f"generate pixels.safetensors --out generated {GENERATE}",
    "generate_npz": f"generate pixels.safetensors --out generated.npz {GENERATE}",
    "generate_webdataset": f"generate pixels.safetensors --out generated-tar --format webdataset {GENERATE}",
    "stats": f"stats pictures --out again.npz --keep-features {JUDGED}",
    "evaluate_pictures": f"""evaluate some --reference statistics.npz --kid --precision --neighbours --out report.json
        {JUDGED}""",
    "evaluate_statistics": f"""evaluate statistics-some.npz --reference statistics.npz --out report-statistics.json
        {JUDGED}""",
    "sweep": f"{SWEEP} --out sweep",
    "sweep_unfinished": f"{SWEEP} --out sweep-unfinished",
}  # fmt: skip


SETTINGS: dict[str, dict[str, Any]] = {
    "sampling": {
        "guidance": 3.0, "guidance_schedule": "constant", "guidance_from": 0.1, "guidance_until": 0.8,
        "guidance_refresh": 3, "spacing": "time", "noisiest": 0.9, "reveal_schedule": "cosine",
        "order": "checkerboard", "x0_bound": 1.5, "steps": 5, "diffusion_steps": 4, "diffusion_steps_end": 6,
        "temperature": 0.8,
    },
    "trunk": {"width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "rotary": True},
    "head": {"width": 16, "depth": 2, "prediction": "v", "batch_mul": 2},
    "model": {"channels": 1, "patch": 4, "buffer": 3, "classes": 3},
    "train": {"colours": 1, "recompute": "full"},
}  # fmt: skip
"""What Python is given: every setting of SamplingConfig but the solver, and the other names that change."""


def command(name: str, *changes: tuple[str, str]) -> list[str]:
    """The words of a recorded command, some of them changed."""
    text = COMMANDS[name]
    for old, new in changes:
        assert old in text, (name, old)
        text = text.replace(old, new)
    return text.split()


def mar_(words: list[str]) -> None:
    """Run a command, which must succeed."""
    print("mar", *words, file=sys.stderr)
    assert main(words) == 0


# ---- what is learned from


def picture(number: int, image_channels: int = 1) -> Image.Image:
    """16x16 pixels of a ramp and a few steps, exact in whole numbers."""
    y, x = np.mgrid[:16, :16]
    planes = [
        (40 * (number % 5) + (9 * x + 2 * number if number % 2 else 9 * y + number) + 30 * ((x + y + c) // 5 % 2)) % 256
        for c in range(image_channels)
    ]
    values = np.stack(planes, -1).astype(np.uint8)
    return Image.fromarray(values[..., 0] if image_channels == 1 else values)


def write_data() -> None:
    for number in range(24):
        path = Path("pictures", "across" if number % 2 else "down", f"{number:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
        if number % 3 == 0:
            copy = Path("some", path.name)
            copy.parent.mkdir(exist_ok=True)
            picture(number + 31).save(copy)
    Path("shards").mkdir()
    for shard in range(3):
        with tarfile.open(f"shards/{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(5 * shard, 5 * shard + 5):
                file = BytesIO()
                picture(number, 3).resize((8, 8), Image.Resampling.NEAREST).save(file, "PNG")
                for name, data in ((f"{number:03}.png", file.getvalue()), (f"{number:03}.cls", b"%d" % (number % 3))):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))


# ---- weights


def awake(model: Any, seed: int) -> Any:
    """Draw every tensor: an untrained head's last layers are zero, and hide what is before them. Gains of norms stay
    near one, or the class would get lost."""
    generator = runtime.generator(seed, 77)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 16
            gain = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            parameter.copy_(gain + torch.randn(parameter.shape, generator=generator) / fan**0.5)
    return model.eval()


def write_weights() -> None:
    images = torch.stack([torch.from_numpy(np.asarray(picture(i))[None].copy()) for i in range(24)]) / 127.5 - 1
    trunk = mar.TrunkConfig(width=16, depth=2, heads=2, mlp_ratio=2.0, rotary=True)
    plain = mar.TrunkConfig(width=16, depth=1, heads=4, mlp_ratio=2.0)
    config = mar.ModelConfig(
        channels=1, grid=(16, 16), patch=4, encoder=trunk, decoder=trunk,
        head=mar.HeadConfig(width=16, depth=2, prediction="v", batch_mul=2), buffer=3, classes=3,
    )  # fmt: skip
    way = mar.SamplingConfig(
        steps=6, diffusion_steps=5, diffusion_steps_end=3, guidance=2.5, temperature=0.9, x0_bound=2.0,
        spacing="log-snr", noisiest=0.95, guidance_from=0.2, guidance_until=0.9, guidance_refresh=2,
        reveal_schedule="exponential", order="halton", solver="ddim",
    )  # fmt: skip
    notes = {"images": 5, "data": "pictures"}
    tokenizer = PixelTokenizer(1, mean=-0.4, std=0.5)
    names = ("ant", "bee", "cat")
    Pipeline(awake(mar.MAR(config), 1), tokenizer, classes=names, sampling=way, notes=notes).save("pixels.safetensors")

    config = mar.ModelConfig(
        channels=16, grid=(4, 4), encoder=plain, decoder=trunk, buffer=2, classes=3,
        head=mar.HeadConfig(width=16, depth=1, prediction="x0"),
    )  # fmt: skip
    way = mar.SamplingConfig(
        steps=5, diffusion_steps=6, guidance=3.0, guidance_schedule="constant", x0_bound=3.0, solver="dpm++2m-sde",
        spacing="log-snr", noisiest=0.9, order="checkerboard",
    )  # fmt: skip
    components = PCATokenizer(1, 4, 16)
    components.fit([images])
    model = Pipeline(awake(mar.MAR(config), 2), components, classes=names, sampling=way, weights="raw", notes=notes)
    model.save("pca4.safetensors")

    config = mar.ModelConfig(
        channels=3, grid=(8, 8), patch=2, encoder=plain, decoder=plain, buffer=1, classes=0,
        head=mar.HeadConfig(width=16, depth=1, path="linear", prediction="flow", diffusion_steps=500),
    )  # fmt: skip
    way = mar.SamplingConfig(steps=4, diffusion_steps=4, x0_bound=2.5, solver="dpm++2s")
    tokenizer = PixelTokenizer(3, mean=[-0.1, 0.0, 0.1], std=[0.5, 0.6, 0.7])
    Pipeline(awake(mar.MAR(config), 3), tokenizer, sampling=way, notes=notes).save("flow.safetensors")


# ---- runs, stopped or finished


def rounded(value: Any) -> Any:
    """Keep 5 bits of each weight, in place of 24: states become small when they are packed."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    mantissa, exponent = value.detach().frexp()
    return torch.ldexp((mantissa * 32).round() / 32, exponent)


@contextmanager
def small_files() -> Iterator[None]:
    """Within, states and tokenizers are written with rounded weights."""
    save, averaged = RunState.save, tokenizer_training.ema_tokenizer

    def save_rounded(self: RunState, images_seen: int, state: dict[str, Any], keep: int = 3) -> Path:
        kept = {name: value if name == "tokenizer" else rounded(value) for name, value in state.items()}
        return save(self, images_seen, kept, keep)

    def averaged_rounded(run: Any) -> Any:
        tokenizer = averaged(run)
        tokenizer.load_state_dict(rounded(tokenizer.state_dict()))
        return tokenizer

    RunState.save, tokenizer_training.ema_tokenizer = save_rounded, averaged_rounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        RunState.save, tokenizer_training.ema_tokenizer = save, averaged  # type: ignore[method-assign]


@contextmanager
def stopped_after(pictures: int) -> Iterator[None]:
    """Within, a model that draws is stopped, as by Ctrl-C, once it has drawn so many pictures."""
    stream, drawn = Pipeline.stream, 0

    def stop(self: Pipeline, *arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal drawn
        if drawn >= pictures:
            raise KeyboardInterrupt
        for part in stream(self, *arguments, **options):
            drawn += len(part)
            yield part

    Pipeline.stream = stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        Pipeline.stream = stream  # type: ignore[method-assign]


def write_runs() -> None:
    for name in ("tokenizer", "run-adamw", "run-muon", "run-folder", "run-stream"):
        with small_files():
            mar_(command(name, (LONGER, BEGUN)))
    for path in [*Path().glob("run-*/model*.safetensors"), *Path().glob("*/samples")]:
        if path.name == "samples":
            shutil.rmtree(path)
        elif path.name != "model-best.safetensors":
            path.unlink()
    for kind in ("png", "npz", "webdataset"):
        with stopped_after(5):
            assert main(command(f"generate_{kind}")) == 130
    for name in ("cache", "cache_unfinished"):
        mar_(command(name))
    Path("cache-unfinished/index.json").unlink()
    sorted(Path("cache-unfinished").glob("*.safetensors"))[1].unlink()
    mar_(command("stats", ("again.npz", "statistics.npz")))
    mar_(command("stats", ("again.npz", "statistics-some.npz"), ("stats pictures", "stats some")))
    mar_(command("sweep"))
    shutil.copytree("sweep", "sweep-unfinished")
    for path in Path().glob("sweep*/sweep.png"):
        path.unlink()
    table = Path("sweep-unfinished/sweep.json")
    held = json.loads(table.read_text())
    del held["rows"][1]
    table.write_text(json.dumps(held, indent=1) + "\n")
    lines = Path("sweep/sweep.csv").read_text().splitlines(keepends=True)
    Path("sweep-unfinished/sweep.csv").write_text("".join(lines[:2]))


def pack_states() -> None:
    """Put each state, whose tensors have more padding than content, into a .tar.gz (`replay.copy_fixtures`)."""
    for folder in [*Path().glob("*/state-*")]:
        with gzip.GzipFile(f"{folder}.tar.gz", "wb", mtime=0) as file, tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(folder, folder.name)
        shutil.rmtree(folder)


# ---- what this version makes of them


def flat(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """All arrays, by their path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}/{key}")
    elif isinstance(value, np.ndarray):
        yield name, value


def without_arrays(value: Any) -> Any:
    """The same without arrays."""
    if not isinstance(value, dict):
        return value
    return {key: without_arrays(inner) for key, inner in value.items() if not isinstance(inner, np.ndarray)}


def main_() -> None:
    torch.set_num_threads(1)
    assert mar.__version__ == "0.1.0"
    source = Path(mar.__file__).parents[2]
    commit = subprocess.check_output(["git", "-C", str(source), "rev-parse", "HEAD"], text=True).strip()
    shutil.rmtree(replay.FIXTURES, ignore_errors=True)
    replay.FIXTURES.mkdir(parents=True)
    os.chdir(replay.FIXTURES)
    commands = {name: text.split() for name, text in COMMANDS.items()}
    Path("commands.json").write_text(
        "{\n" + ",\n".join(f" {json.dumps(n)}: {json.dumps(words)}" for n, words in commands.items()) + "\n}\n"
    )
    Path("settings.json").write_text(
        "{\n" + ",\n".join(f" {json.dumps(n)}: {json.dumps(values)}" for n, values in SETTINGS.items()) + "\n}\n"
    )
    Path("judge.py").write_text(JUDGE)
    write_data()
    write_weights()
    write_runs()
    pack_states()
    shutil.rmtree("__pycache__", ignore_errors=True)
    expected: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, use in replay.REPLAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            replay.copy_fixtures(Path(folder))
            os.chdir(folder)
            outcome = use()
            os.chdir(replay.FIXTURES)
        expected[name] = without_arrays(outcome)
        arrays |= dict(flat(outcome, name))
    text = "{\n" + ",\n".join(f" {json.dumps(n)}: {json.dumps(values)}" for n, values in expected.items()) + "\n}\n"
    Path("expected.json").write_text(text)
    np.savez_compressed("expected.npz", **arrays)  # type: ignore[arg-type]
    Path("README.md").write_text(README.format(commit=commit, torch=torch.__version__.split("+")[0]))


README = """\
# Files of version 0.1

Made by `tests/compat/make_fixtures.py` with commit {commit}
and torch {torch}, before names in the code were changed. Never make them again: they stand for files that users have.

| | |
| --- | --- |
| `pictures/`, `some/`, `shards/` | what is learned from, and what is judged |
| `pixels`, `pca4`, `flow` `.safetensors` | weights, all drawn: v, x0 and the flow; settings are not the defaults |
| `run-adamw`, `run-muon`, `run-folder`, `run-stream` | runs with the state after 3 steps (`state-*`, packed) |
| `tokenizer` | a tokenizer, finished after 3 steps, with its state, its discriminator's too |
| `cache`, `cache-unfinished` | latents by that tokenizer; a shard and the index are missing |
| `generated`, `generated.npz.*`, `generated-tar` | outputs of `mar generate`, stopped half way |
| `statistics.npz`, `statistics-some.npz` | of `mar stats --keep-features`, by `judge.py` |
| `sweep`, `sweep-unfinished` | of two points; of one |
| `commands.json`, `settings.json` | command lines, and what Python was given, by the names of then |
| `expected.json`, `expected.npz` | what that version makes of all this (`tests/compat/replay.py`) |
"""

if __name__ == "__main__":
    main_()
