"""Use the files that version 0.1 left, and tell what came of it: pictures, losses, statistics.

Each function runs in a folder that holds a copy of the fixtures, by `mar.cli.main` and `import mar` alone, and returns
its outcome by name. `make_fixtures.py` recorded what version 0.1 returns; `test_files_of_v0_1.py` compares. What its
users typed is data (`commands.json`, `settings.json`): no renaming touches it.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

import mar
from mar.checkpoint.checksums import read_json
from mar.cli import main

Outcome = dict[str, Any]
"""Numbers, texts, lists and arrays of them; uint8 arrays are pictures; names with `bits.` are digests of floats."""

FIXTURES = Path(__file__).parent / "fixtures" / "v0_1"
LABELS = ["ant", 1, "cat", None]
SEEDS = [0, 7, 2, 2**33]
TIMES = ("images_per_second", "seconds")
"""Numbers of a log that depend on the clock."""


def run(name: str) -> None:
    """Run a recorded command line, which must succeed."""
    command = json.loads((FIXTURES / "commands.json").read_text(encoding="utf-8"))[name]
    assert main(command) == 0, " ".join(command)


def settings(kind: str) -> dict[str, Any]:
    """Read what Python was given, by the names of version 0.1."""
    held: dict[str, Any] = json.loads((FIXTURES / "settings.json").read_text(encoding="utf-8"))[kind]
    return held


def pixels(images: Iterable[Image.Image]) -> np.ndarray:
    """Stack pictures as one array."""
    return np.stack([np.asarray(image) for image in images])


def opened(path: Path) -> tuple[np.ndarray, Any]:
    """Read a PNG: its pixels, and the settings in its metadata."""
    with Image.open(path) as image:
        facts = json.loads(image.text["mar"]) if "mar" in image.info else None
        return np.asarray(image), facts


def digest(*paths: Path) -> str:
    """Hash files, by name and content."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


# ---- weights


def _weights(name: str, labels: list[Any], **way: Any) -> Outcome:
    model = mar.load(f"{name}.safetensors", device="cpu")
    return {
        "fingerprint": model.fingerprint(),
        "classes": list(model.classes),
        "notes": model.notes,
        "images": pixels(model.sample(labels, SEEDS, **way)),
        "one_by_one": pixels(model.sample(labels, SEEDS, batch=1, **way)),
    }


def weights_pixels() -> Outcome:
    """Draw by the settings in the file's header."""
    return _weights("pixels", LABELS)


def weights_pca4() -> Outcome:
    """Draw from a model of x0 of principal components."""
    return _weights("pca4", LABELS)


def weights_flow() -> Outcome:
    """Draw from an unconditional model of the flow, in colour."""
    return _weights("flow", [None] * 4)


def weights_preset() -> Outcome:
    """Draw by a preset."""
    return _weights("pixels", LABELS, preset="fast")


def weights_saved_again() -> Outcome:
    """Open a file, save it, and open that."""
    mar.load("pixels.safetensors", device="cpu").save("again.safetensors")
    return _weights("again", LABELS)


def weights_known_parts() -> Outcome:
    """Keep parts of pictures, and watch the others grow."""
    model = mar.load("pixels.safetensors", device="cpu")
    known = model.sample(LABELS, SEEDS)
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[:, 2:] = True
    kept = model.sample(LABELS[::-1], SEEDS, known=known, mask=mask)
    grown = [step.images[0] for step in model.reveal(["bee"], [5])]
    return {"kept": pixels(kept), "grown": pixels(grown)}


def weights_old_words() -> Outcome:
    """Draw with every setting by its old name."""
    return _weights("pixels", LABELS, **settings("sampling"))


def weights_old_words_elsewhere() -> Outcome:
    """Take old names wherever settings are taken."""
    model = mar.load("pixels.safetensors", device="cpu")
    way = model.sampling_with(**settings("sampling"))
    drawn = mar.Pipeline(model.model, model.tokenizer, classes=model.classes, sampling=way).sample(LABELS, SEEDS)
    streamed = np.concatenate([part.numpy() for part in model.stream(LABELS, SEEDS, batch=3, **settings("sampling"))])
    grown = [step.images[0] for step in model.reveal(["cat"], [2], **settings("sampling"))]
    return {"drawn": pixels(drawn), "streamed": streamed, "last": np.asarray(grown[-1]), "steps": len(grown)}


def weights_old_words_of_configs() -> Outcome:
    """Build public configs by their old fields: the weights of one model, drawn with by another object."""
    model = mar.load("pixels.safetensors", device="cpu")
    trunk, head = mar.TrunkConfig(**settings("trunk")), mar.HeadConfig(**settings("head"))
    config = mar.ModelConfig(**settings("model"), grid=(16, 16), encoder=trunk, decoder=trunk, head=head)
    mar.TrainConfig(**settings("train"), model=config)
    other = mar.MAR(config)
    other.load_state_dict(model.model.state_dict())
    way = mar.SamplingConfig(solver="ddim", **settings("sampling"))
    built = mar.Pipeline(other, model.tokenizer, classes=model.classes, sampling=way)
    return {"images": pixels(built.sample(LABELS, SEEDS))}


# ---- drawing by the command line


def sample() -> Outcome:
    """Draw by `mar sample` with every option by its old name; PNGs say their settings."""
    run("sample")
    found: Outcome = {}
    for path in sorted(Path("out").glob("*.png")):
        found[f"image.{path.name}"], found[f"facts.{path.name}"] = opened(path)
    return found


def generate_png() -> Outcome:
    """Continue a folder of PNGs: old files stay, new ones have the same pixels and the new names of the settings."""
    there = {path: path.read_bytes() for path in Path("generated").rglob("*.png")}
    assert 0 < len(there) < 9
    run("generate_png")
    assert all(path.read_bytes() == data for path, data in there.items())
    found: Outcome = {}
    paths = sorted(Path("generated").rglob("*.png"))
    for path in paths:
        found[f"image.{path.stem}"], found[f"facts.{path.stem}"] = opened(path)
    return {**found, "manifest": _manifest(Path("generated/generate.json"))}


def generate_npz() -> Outcome:
    """Go on with an .npz that lies in parts."""
    assert not Path("generated.npz").exists()
    run("generate_npz")
    with np.load("generated.npz") as held:
        images, labels = held["arr_0"], held["arr_1"].tolist()
    return {
        "images": images, "labels": labels, "manifest": _manifest(Path("generated.npz.json")),
        "bits.file": digest(Path("generated.npz")),
    }  # fmt: skip


def generate_webdataset() -> Outcome:
    """Go on with tar shards; facts in PNGs have new names, so that pixels and classes are compared."""
    run("generate_webdataset")
    paths = sorted(Path("generated-tar").glob("*.tar"))
    bits = hashlib.sha256()
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                data = content.read()
                bits.update(member.name.encode())
                bits.update(Image.open(io.BytesIO(data)).tobytes() if member.name.endswith(".png") else data)
    return {
        "files": [path.name for path in paths], "manifest": _manifest(Path("generated-tar/generate.json")),
        "bits.members": bits.hexdigest(),
    }  # fmt: skip


def _manifest(path: Path) -> Any:
    """Read what an output was begun with, but for the version."""
    held = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in held.items() if name != "mar"}


# ---- runs


def _resumed(folder: str, *, draw: list[Any]) -> Outcome:
    """Go on with a run; tell the log of the steps that come, and what its exported weights draw."""
    log = Path(folder, "log.jsonl")
    before = log.read_text(encoding="utf-8")
    run(folder)
    after = log.read_text(encoding="utf-8")
    assert after.startswith(before), "what was logged stays"
    lines = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert sum("loss" in line for line in lines) == 3
    found: Outcome = {"log": _numbers(lines)}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        model = mar.load(path, device="cpu")
        found[f"bits.{path.stem}"] = model.fingerprint()
        found[f"image.{path.stem}"] = pixels(model.sample(draw, range(len(draw))))
        found[f"notes.{path.stem}"] = model.notes
    for path in sorted(Path(folder, "samples").glob("*.png")):
        found[f"sheet.{path.stem}"] = opened(path)[0]
    files = {path.name for path in Path(folder).iterdir() if not path.name.startswith(".")}
    found["files"] = sorted(files - {"index.html"})  # version 0.1 wrote no page
    return found


def _numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the clock, sentences for people, and accounts of the data, which began later."""
    told = [line for line in lines if "account" not in line]
    return [{n: v for n, v in line.items() if n not in TIMES and not isinstance(v, str)} for line in told]


def _losses(folder: Path) -> list[float]:
    """Read a new run's losses of each step."""
    return [line["loss"] for line in _lines(folder) if "loss" in line]


def _lines(folder: Path) -> list[dict[str, Any]]:
    """Read a run's log."""
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]


def run_adamw() -> Outcome:
    """Go on with a run by AdamW on principal components, with `--recompute selective` and `--colours 1`."""
    return _resumed("run-adamw", draw=["down", "across", None])


def run_muon() -> Outcome:
    """Go on with a run by Muon with several averages, pictures held out, and losses that it waits for."""
    history = Path("run-muon/validation.json")
    before = json.loads(history.read_text(encoding="utf-8"))
    held_out = Path("run-muon/held-out.json").read_bytes()
    found = _resumed("run-muon", draw=["down", "across", None])
    after = read_json(history)
    assert {**after["losses"], **before["losses"]} == after["losses"], "losses that were measured stay"
    assert Path("run-muon/held-out.json").read_bytes() == held_out
    return {**found, "validation": after}


def run_muon_ends() -> Outcome:
    """End a run by the losses that were measured before it was resumed."""
    history = Path("run-muon/validation.json")
    held = json.loads(history.read_text(encoding="utf-8"))
    images = int(max(held["losses"], key=int))
    held["losses"] = {str(n): 1.0 + n for n in range(images - 3, images + 1)}  # the first was the lowest, 3 came after
    history.write_text(json.dumps(held), encoding="utf-8")
    before = _lines(Path("run-muon"))
    run("run-muon")
    assert _numbers(_lines(Path("run-muon"))) == _numbers(before), "not a step is taken"
    return {"files": sorted(path.name for path in Path("run-muon").glob("state-*"))}


def run_folder() -> Outcome:
    """Go on with `mar train folder`: its choices, its latents, its run."""
    survey = Path("run-folder/pictures.json").read_bytes()
    latents = digest(*sorted(Path("run-folder/latents").iterdir()))
    found = _resumed("run-folder", draw=["down", "across", None])
    assert Path("run-folder/pictures.json").read_bytes() == survey
    assert digest(*sorted(Path("run-folder/latents").iterdir())) == latents, "a finished cache is not made again"
    return found


def run_stream() -> Outcome:
    """Go on with a run that reads shards in passing, from where they stand."""
    return _resumed("run-stream", draw=[0, 1, 2, None])


def run_init() -> Outcome:
    """Start a run from the weights of another one."""
    run("run-init")
    return {"losses": _losses(Path("run-init"))}


# ---- tokenizers and caches


def tokenizer() -> Outcome:
    """Go on with a tokenizer's training, discriminator and all."""
    log = Path("tokenizer/log.jsonl")
    before = log.read_text(encoding="utf-8")
    run("tokenizer")
    after = log.read_text(encoding="utf-8")
    assert after.startswith(before), "what was logged stays"
    lines = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert sum("loss" in line for line in lines) == 3
    return {
        "log": _numbers(lines),
        "statistics": read_json(Path("tokenizer/mar_statistics.json")),
        "sheet": opened(sorted(Path("tokenizer/samples").glob("*.png"))[-1])[0],
        "bits.weights": digest(Path("tokenizer/diffusion_pytorch_model.safetensors")),
    }


def cache() -> Outcome:
    """Check a cache, find it finished, and learn from it."""
    files = sorted(Path("cache").iterdir())
    before = digest(*files)
    run("cache_verify")
    run("cache")
    assert digest(*sorted(Path("cache").iterdir())) == before
    run("cache_train")
    return {"losses": _losses(Path("run-cached"))}


def cache_goes_on() -> Outcome:
    """Make the shards of a cache that are missing."""
    there = {path.name: path.read_bytes() for path in Path("cache-unfinished").glob("*.safetensors")}
    run("cache_unfinished")
    new = {path.name: load_file(path) for path in Path("cache-unfinished").glob("*.safetensors")}
    assert all(Path("cache-unfinished", name).read_bytes() == data for name, data in there.items())
    index = json.loads(Path("cache-unfinished/index.json").read_text(encoding="utf-8"))
    return {
        "latents": {name: tensors for name, tensors in new.items() if name not in there},
        "bits.shards": [shard["sha256"] for shard in index["content"]["shards"]],
    }


# ---- evaluation


def statistics() -> Outcome:
    """Measure statistics again, and hold pictures against those that are kept."""
    run("evaluate_pictures")
    run("evaluate_statistics")
    run("stats")
    with np.load("again.npz") as again, np.load("statistics.npz") as kept:
        assert {*again.files} - {*kept.files} == {"sha256"}
        numbers = {name: again[name] for name in kept.files if again[name].dtype.kind in "fi"}
        texts = {name: str(again[name]) for name in kept.files if again[name].dtype.kind not in "fi"}
    return {
        "pictures": _report(json.loads(Path("report.json").read_text(encoding="utf-8"))),
        "statistics": _report(json.loads(Path("report-statistics.json").read_text(encoding="utf-8"))),
        "again": numbers, "texts": texts,
    }  # fmt: skip


def sweep() -> Outcome:
    """Find a sweep finished: nothing is drawn again, and what was measured stays, the seconds too."""
    before = _rows(Path("sweep"))
    run("sweep")
    assert _rows(Path("sweep")) == before
    return {"rows": _rows(Path("sweep"))}


def sweep_goes_on() -> Outcome:
    """Measure the point of a sweep that is missing; the other stays as it is, its seconds too."""
    before = _rows(Path("sweep-unfinished"))
    run("sweep_unfinished")
    after = _rows(Path("sweep-unfinished"))
    assert (len(before), len(after)) == (1, 2)
    assert after[:1] == before
    del after[1]["seconds"]
    return {"there": after[0], "drawn": after[1]}


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Read a sweep's table: points by their values, and what was measured."""
    rows = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["rows"]
    return [
        {"point": [*row["point"].values()], "seconds": row["report"]["seconds"], **_report(row["report"])}
        for row in rows
    ]


def _report(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out the clock, and sentences for people."""
    return {name: value for name, value in values.items() if name not in ("seconds", "warnings", "metric")}


REPLAYS: dict[str, Callable[[], Outcome]] = {
    function.__name__: function
    for function in (
        weights_pixels, weights_pca4, weights_flow, weights_preset, weights_saved_again, weights_known_parts,
        weights_old_words, weights_old_words_elsewhere, weights_old_words_of_configs, sample, generate_png,
        generate_npz, generate_webdataset, run_adamw, run_muon, run_muon_ends, run_folder, run_stream, run_init,
        tokenizer, cache, cache_goes_on, statistics, sweep, sweep_goes_on,
    )
}  # fmt: skip


def copy_fixtures(to: Path) -> None:
    """Copy what a replay needs into an empty folder, and unpack the states of runs."""
    shutil.copytree(FIXTURES, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("expected.*", "README.md"))
    for packed in to.glob("*/state-*.tar.gz"):
        with tarfile.open(packed) as tar:
            tar.extractall(packed.parent, filter="data")
        packed.unlink()
