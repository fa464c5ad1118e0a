"""The studio without the web: loads models, draws pictures step by step, one request after the other.

All of it happens on one worker thread, so that requests never compete for the processor, and torch keeps one pool of
threads. Nothing of a request is kept after it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from mar.app import settings as words
from mar.app.pictures import facts_of, png_url, preview_url, read_picture
from mar.app.prompts import check_prompts, describe_prompts, sample_prompt, unlogged_prompts
from mar.app.timings import Timings
from mar.config import Preset, SamplingConfig, rename_old_keys, to_dict
from mar.config.fields import renamed_fields

if TYPE_CHECKING:
    from PIL import Image

    from mar.checkpoint.download import RemoteFile
    from mar.pipeline import Pipeline, RevealStep

MAX_IMAGES = 16
"""Most pictures of a request."""
MAX_LABEL = 200
"""Longest label, in characters."""
MAX_PROMPT = 300
"""Longest prompt, in characters."""
MAX_GROW = 64
MAX_LOADED = 2
"""Models that stay in memory."""
MAX_TICKET = 100
"""Longest ticket, in characters."""
MAX_STOPS = 1000
"""Requests to stop that are remembered, of requests not begun yet."""
PREVIEW_SHARE = 0.08
"""Largest share of the time that previews may take."""
PREVIEW_INTERVAL_S = 0.01
MEASURE_S = 3.0
"""Longest measurement of a preset; its time is then estimated from the steps done."""
PRESETS: tuple[str, ...] = get_args(Preset)
_UNREPEATABLE = {
    frozenset({"edited", "stopped", "known"}): "it was painted over or stopped, which Draw can't repeat",
    frozenset({"labels", "prompts", "seeds"}): "it is a sheet of several pictures, which Draw can't repeat",
    frozenset({"image_size"}): "it is of another size than the model's, which Draw can't repeat",
}
"""Marks in a picture's settings, and why these do not make it again."""

Emit = Callable[[dict[str, Any]], None]
"""Takes the events of a request, as they happen."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class DrawRequest:
    """A checked request for pictures, made by `read_request`; it has labels or prompts."""

    model: str
    labels: list[int | str | None] | None
    seeds: list[int]
    preset: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    known: Image.Image | None = None
    mask: Image.Image | None = None
    grow: int = 1
    prompts: list[str | None] | None = None

    @property
    def asks(self) -> Sequence[int | str | None]:
        """The labels or prompts, one per picture."""
        return (self.labels if self.prompts is None else self.prompts) or []


def read_request(
    model: Any, labels: Any, seeds: Any, preset: Any = None, settings: Any = None, known: Any = None, mask: Any = None,
    grow: Any = 1, prompts: Any = None,
) -> DrawRequest:  # fmt: skip
    """Check a request from outside. Raises ValueError, which says what is wrong.

    Args:
        model: one of the catalog.
        labels: class names, numbers or None; None instead of a list: there are prompts.
        seeds: one per label or prompt.
        preset: of `mar.presets`, or None.
        settings: fields of SamplingConfig (None: none).
        known, mask: data URLs of a picture, and of white where to draw in it; or both None.
        grow: tokens around the white parts to draw as well.
        prompts: what to draw, in words, for a model that draws from them; None: there are labels.
    """
    if not isinstance(model, str):
        raise ValueError(f"model: got {type(model).__name__}, expected a name")
    if labels is not None and prompts is not None:
        raise ValueError("got labels and prompts, expected one of them")
    name, asks = ("labels", labels) if prompts is None else ("prompts", prompts)
    if not isinstance(asks, list) or not 1 <= len(asks) <= MAX_IMAGES:
        raise ValueError(f"{name}: got {_count(asks)}, expected a list of 1 to {MAX_IMAGES}, one per picture")
    for label in asks if prompts is None else []:
        if isinstance(label, bool) or not isinstance(label, int | str | None) or len(str(label)) > MAX_LABEL:
            raise ValueError(f"label {str(label)[:40]!r}: expected a class name, a number, or nothing")
    for prompt in asks if prompts is not None else []:
        _check_prompt(prompt)
    if not isinstance(seeds, list) or len(seeds) != len(asks):
        raise ValueError(f"seeds: got {_count(seeds)}, expected one per {name[:-1]}, {len(asks)}")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed {str(seed)[:40]}: expected a whole number, 0 or more, of 63 bits")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: got {str(preset)[:40]!r}, expected one of {', '.join(PRESETS)}")
    if (known is None) != (mask is None):
        raise ValueError("known and mask: got only one of them, expected both")
    if isinstance(grow, bool) or not isinstance(grow, int) or not 0 <= grow <= MAX_GROW:
        raise ValueError(f"grow: got {str(grow)[:40]}, expected a whole number from 0 to {MAX_GROW}")
    return DrawRequest(
        model, labels, seeds, preset, words.read_settings({} if settings is None else settings),
        None if known is None else read_picture(known, "known"), None if mask is None else read_picture(mask, "mask"),
        grow, prompts,
    )  # fmt: skip


def _check_prompt(prompt: Any) -> None:
    """Raise ValueError for what is no prompt, and for one that is too long."""
    if not isinstance(prompt, str | None):
        raise ValueError(f"prompt {str(prompt)[:40]!r}: got {type(prompt).__name__}, expected text")
    if prompt is not None and len(prompt) > MAX_PROMPT:
        raise ValueError(f"prompt '{prompt[:40]}...': got {len(prompt)} characters, expected at most {MAX_PROMPT}")


def _count(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, list) else type(value).__name__


@dataclass(frozen=True)
class Work:
    """A request in the worker's queue."""

    ticket: str
    stop: threading.Event
    """Stops it within a reveal step, or before it begins."""
    future: Future[None]


@dataclass
class Model:
    """A model of the catalog."""

    name: str
    state: str = "waiting"
    """waiting: not loaded yet; loading; ready; absent: not downloaded; failed."""
    error: str = ""
    """Reason why it failed, in one line."""
    mebibytes: float = 0.0
    """Size of its download, if it is absent; 0: unknown."""
    about: str = ""
    """Parameters, pixels and figures of a published model."""
    received: float | None = None
    """MiB of the download that is under way."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Sizes, classes and defaults, once it was loaded."""
    fingerprint: str = ""

    def describe(self) -> dict[str, Any]:
        """Return what the page shows of it."""
        return {
            "name": self.name, "state": self.state, "error": self.error, "mebibytes": self.mebibytes,
            "received": self.received, "about": self.about, **self.facts,
        }  # fmt: skip


class Studio:
    """Draws pictures with several models, one request after the other.

    Args:
        models: names that `mar.load` takes. Published ones that are not here are offered for download.
        device, dtype: of all models, as the command line names them.
        downloads: whether `download` may be called.
        timings: where seconds per picture are kept.
    """

    def __init__(
        self, models: Sequence[str], *, device: str = "auto", dtype: str = "fp32", downloads: bool = True,
        timings: Timings | None = None,
    ) -> None:  # fmt: skip
        from mar.published import PUBLISHED

        self.models = {name: Model(name) for name in dict.fromkeys([*models, *PUBLISHED])}
        self.device, self.dtype, self.downloads = device, dtype, downloads
        self.timings = timings or Timings()
        self._pipelines: OrderedDict[str, Pipeline] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mar-studio")
        self._waiting = 0
        self._works: set[Work] = set()
        self._early_stops: OrderedDict[str, None] = OrderedDict()
        """Tickets that were stopped before their request came."""
        self._planned: set[str] = set()
        """Models that are about to be prepared."""
        self._closing = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.RLock()
        for name, record in PUBLISHED.items():
            self.models[name].about = record.summary()
            self._check_download(self.models[name])

    # ---- models

    def catalog(self) -> list[dict[str, Any]]:
        """List the models, with the seconds of their presets."""
        return [
            {**model.describe(), "seconds": {each: self._seconds(model, each) for each in PRESETS}}
            for model in self.models.values()
        ]

    def prepare(self, name: str) -> None:
        """Load a model, and measure its presets between requests."""
        self.model(name)
        self._plan(name)

    def model(self, name: Any) -> Model:
        """Return a model of the catalog. Raises ValueError for another name."""
        if not isinstance(name, str) or name not in self.models:
            got = repr(name[:80]) if isinstance(name, str) else type(name).__name__
            raise ValueError(f"model: got {got}, expected one of {', '.join(self.models)}")
        return self.models[name]

    def download(self, name: str) -> None:
        """Start the download of an official model and its tokenizer."""
        model = self.model(name)
        if not self.downloads:
            raise ValueError(f"this server does not download; on its machine: mar download {name}")
        with self._lock:
            if model.state not in ("absent", "failed") or not _missing(name) or model.received is not None:
                raise ValueError(f"{name} is here already, or on its way")
            model.received, model.error = 0.0, ""
        threading.Thread(target=self._download, args=(model,), daemon=True).start()

    def _download(self, model: Model) -> None:
        from mar.checkpoint.download import fetch
        from mar.published import MIB

        done = 0.0
        try:
            for remote in _missing(model.name):

                def progress(received: int, total: int | None, before: float = done) -> None:
                    model.received = before + received / MIB

                fetch(remote, progress=progress)
                done = model.received or done
        except (ValueError, OSError) as error:
            model.error = _one_line(error)
        self._check_download(model)
        model.received = None
        if model.state == "waiting":
            self._plan(model.name)

    def _check_download(self, model: Model) -> None:
        missing = _missing(model.name)
        sizes = [remote.mebibytes for remote in missing]
        model.mebibytes = 0.0 if None in sizes else sum(size or 0.0 for size in sizes)
        model.state = "absent" if missing else "waiting"

    def _plan(self, name: str) -> None:
        """Prepare a model behind the requests that wait."""
        with self._lock:
            if name in self._planned:
                return
            self._planned.add(name)
        self._submit(self._prepare, name)

    def _prepare(self, name: str) -> None:
        with self._lock:
            self._planned.discard(name)
        try:
            pipeline = self._load(name)
        except ValueError:
            return
        missing = [each for each in reversed(PRESETS) if self._seconds(self.models[name], each) is None]
        if missing:
            self._measure(pipeline, name, missing[0], keep=False)  # the first picture is slower than the others
        for preset in missing:
            if not self._measure(pipeline, name, preset):
                self._plan(name)  # it goes on behind the requests that it made way for
                return

    def _load(self, name: str) -> Pipeline:
        model = self.model(name)
        if name in self._pipelines:
            self._pipelines.move_to_end(name)
            return self._pipelines[name]
        if model.state == "absent":
            raise ValueError(f"{name} is not downloaded: mar download {name}")
        from mar import zoo
        from mar.devices import torch_dtype

        model.state = "loading"
        while len(self._pipelines) >= MAX_LOADED:
            dropped, _ = self._pipelines.popitem(last=False)
            self.models[dropped].state = "waiting"
        try:
            pipeline = zoo.load(name, device=self.device, dtype=torch_dtype(self.dtype))
        except (ValueError, OSError, RuntimeError) as error:
            model.state, model.error = "failed", _one_line(error)
            raise ValueError(f"{name} can't be loaded: {model.error}") from error
        model.facts, model.fingerprint = _describe(pipeline), pipeline.fingerprint()
        model.state, model.error = "ready", ""
        self._pipelines[name] = pipeline
        return pipeline

    def _seconds(self, model: Model, preset: str) -> float | None:
        return self.timings.get(self._machine(model), preset) if model.fingerprint else None

    def _machine(self, model: Model) -> str:
        return f"{model.fingerprint[:16]} {self.device} {self.dtype}"

    def _measure(self, pipeline: Pipeline, name: str, preset: str, keep: bool = True) -> bool:
        """Measure a preset, unless a request comes in between."""
        started = time.perf_counter()
        share, seconds = 0.0, 0.0
        labels = None if pipeline.captions else [0 if pipeline.model.config.classes else None]
        prompts = [sample_prompt(pipeline)] if pipeline.captions else None
        for step in pipeline.reveal(labels, prompts=prompts, preset=preset, allow_broken=True):
            if self._waiting or self._closing.is_set():
                return False
            share, seconds = step.step / step.steps, time.perf_counter() - started
            if seconds > MEASURE_S:
                break
        if keep:
            self.timings.put(self._machine(self.models[name]), preset, seconds / share)
        return True

    def _learn(self, model: Model, preset: str, seconds: float, count: int) -> None:
        """Keep the seconds of one picture; of several at once, only if they took no longer than one is known to."""
        known = self._seconds(model, preset)
        if count == 1 or (known is not None and seconds < known):
            self.timings.put(self._machine(model), preset, seconds)

    # ---- requests

    def submit(self, request: DrawRequest, emit: Emit, ticket: str = "") -> Work:
        """Add a request to the worker's queue; its last event has the kind `done`.

        Args:
            request: what to draw.
            emit: takes the events, on the worker's thread.
            ticket: by which `stop` knows the request.
        """
        stop = threading.Event()
        with self._lock:  # `stop` finds the ticket before or after, never between
            if ticket and ticket in self._early_stops:
                del self._early_stops[ticket]
                stop.set()
            work = Work(ticket, stop, self._queue(self._draw, request, emit, stop))
            self._works.add(work)
        work.future.add_done_callback(lambda _: self._forget(work))
        return work

    def open(self, name: str, url: Any) -> dict[str, Any]:
        """Crop a picture to a model's size; read the settings inside it.

        Args:
            name: of the model.
            url: data URL of the picture.
        """
        from mar.data.images import Transform
        from mar.pipeline import to_pil

        self.model(name)
        picture = read_picture(url)
        pipeline = self._pipelines.get(name) or self._queue(self._load, name).result()
        pixels = Transform(pipeline.image_size, pipeline.tokenizer.image_channels)(picture)
        [image] = to_pil(pixels.unsqueeze(0))
        facts = facts_of(picture)
        restored, note = None, ""
        if facts is not None:
            try:
                restored = _restored(pipeline, facts)
            except ValueError as error:
                note = f"its settings do not fit this model: {_one_line(error)}"
            else:
                note = _unrepeatable(facts, self.models[name])
        return {"image": png_url(image, facts if restored else None), "restored": restored, "note": note}

    def check(self, name: str, prompts: Any) -> dict[str, Any]:
        """Tell what a model does not read of prompts, as `check_prompts` does.

        Args:
            name: of the model.
            prompts: as in `read_request`.
        """
        self.model(name)
        request = read_request(name, None, [0] * len(prompts) if isinstance(prompts, list) else [], prompts=prompts)
        pipeline = self._pipelines.get(name) or self._queue(self._load, name).result()
        return check_prompts(pipeline, request.prompts or [])

    def confidence(self, name: str, label: Any, url: Any, prompt: Any = None) -> list[list[float]]:
        """Return the diffusion loss of each token of a picture.

        Args:
            name: of the model.
            label: class of the picture, or None.
            url: data URL of the picture.
            prompt: for a model that draws from words; None: none.
        """
        self.model(name)
        labels, prompts = ([label], None) if prompt is None else (label, [prompt])
        request = read_request(name, labels, [0], prompts=prompts)
        picture = read_picture(url)

        def measure() -> list[list[float]]:
            with unlogged_prompts():
                losses = self._load(name).token_losses(request.labels, [picture], prompts=request.prompts)
            rows: list[list[float]] = losses[0].tolist()
            return rows

        return self._queue(measure).result()

    def stop(self, ticket: str) -> None:
        """Stop a request within a reveal step, or before it begins."""
        if not 0 < len(ticket) <= MAX_TICKET:
            raise ValueError(f"ticket: got {len(ticket)} characters, expected 1 to {MAX_TICKET}")
        with self._lock:
            works = [work for work in self._works if work.ticket == ticket]
            if not works:
                self._early_stops[ticket] = None
                while len(self._early_stops) > MAX_STOPS:
                    self._early_stops.popitem(last=False)
        for work in works:
            work.stop.set()

    def close(self, timeout: float = 2.0) -> bool:
        """Stop all requests; returns whether the worker has ended.

        Args:
            timeout: seconds to wait for it: a step of a large model, or its loading, can't be stopped.
        """
        self._closing.set()
        with self._lock:
            for work in self._works:
                work.stop.set()
        self._worker.shutdown(wait=False, cancel_futures=True)
        return self._idle.wait(timeout)

    def _forget(self, work: Work) -> None:
        with self._lock:
            self._works.discard(work)

    def _submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run work on the worker's thread."""

        def run() -> Result:
            self._idle.clear()
            try:
                return work(*arguments)
            finally:
                self._idle.set()

        try:
            return self._worker.submit(run)
        except RuntimeError:  # it was shut down
            future: Future[Result] = Future()
            future.set_exception(ValueError("the studio is closing"))
            return future

    def _queue(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run work on the worker's thread; measurements make way for it."""
        with self._lock:
            self._waiting += 1

        def run() -> Result:
            with self._lock:
                self._waiting -= 1
            return work(*arguments)

        return self._submit(run)

    def _draw(self, request: DrawRequest, emit: Emit, stop: threading.Event) -> None:
        nothing = {"kind": "done", "images": [], "seconds": 0.0, "step": 0, "steps": 0, "stopped": True}
        if stop.is_set():  # a model that nobody waits for would take another one's place
            emit(nothing)
            return
        pipeline = self._load(request.model)
        count = len(request.asks)
        kept: dict[str, Any] = {}
        if request.known is not None and request.mask is not None:
            kept = {"known": [request.known] * count, "mask": [request.mask] * count, "grow": request.grow}
        started, preview = time.perf_counter(), Previews()
        step: RevealStep | None = None
        options = {"prompts": request.prompts, **kept, **request.settings}
        reveal = pipeline.reveal(request.labels, request.seeds, preset=request.preset, **options)
        with unlogged_prompts():
            for step in reveal if not stop.is_set() else ():
                seconds = time.perf_counter() - started
                progress = {"kind": "step", "step": step.step, "steps": step.steps, "seconds": round(seconds, 3)}
                if step.step <= 1:
                    emit({"kind": "begin", "step": 0, "steps": step.steps, "revealed_at": step.revealed_at.tolist()})
                if step.step < step.steps:
                    previews = preview.of(step)
                    emit(progress if previews is None else {**progress, "images": previews})
                if stop.is_set() or self._closing.is_set():
                    break
        seconds = time.perf_counter() - started
        if step is None:
            emit(nothing)
            return
        notes = {} if request.prompts is None else {"notes": check_prompts(pipeline, request.prompts)["notes"]}
        stopped = step.step < step.steps
        images = self._pictures(request, pipeline, step.images, stopped)
        emit(
            {
                "kind": "done", "step": step.step, "steps": step.steps, "seconds": round(seconds, 3),
                "stopped": stopped, "images": images, **notes,
            }
        )  # fmt: skip
        if not stopped and request.known is None and not request.settings:
            self._learn(self.models[request.model], request.preset or "exact", seconds, count)
        self._plan(request.model)

    def _precision(self) -> dict[str, Any]:
        """Return the option by which `mar sample` draws in this precision; {}: all machines do, by default."""
        from mar.devices import choose_device, default_precision

        return {} if self.dtype == default_precision(choose_device("auto")) == "fp32" else {"dtype": self.dtype}

    def _pictures(
        self, request: DrawRequest, pipeline: Pipeline, images: Sequence[Image.Image], stopped: bool
    ) -> list[dict[str, Any]]:
        """Return the drawn pictures, with their settings inside them and in words."""
        sampling = pipeline.sampling_with(request.preset, **request.settings)
        facts: dict[str, Any] = {
            "model": request.model, "weights": self.models[request.model].fingerprint, "dtype": self.dtype,
            **to_dict(sampling),
        }  # fmt: skip
        options = self._precision()
        dtype = options.get("dtype")
        if request.known is not None:
            facts["edited"] = True
            options |= {"known": "known.png", "mask": "mask.png", "grow": request.grow}
        if stopped:
            facts["stopped"] = True
        preset = None if request.preset == "exact" else request.preset  # exact: the model's own settings
        changed = words.changed_settings(pipeline, preset, sampling)
        grow = None if request.known is None else request.grow
        pictures = []
        for image, ask, seed in zip(images, request.asks, request.seeds, strict=True):
            said = pipeline.condition_metadata(ask)
            condition = said if pipeline.captions else {"label": _label(pipeline, said["label"])}
            recipe = (request.model, condition, seed, preset, changed)
            pictures.append(
                {
                    "image": png_url(image, {**said, "seed": seed, **facts}),
                    **condition,
                    "seed": seed,
                    "command": words.command_line(*recipe, options),
                    "python": words.python_code(*recipe, dtype=dtype, grow=grow),
                }
            )
        return pictures


class Previews:
    """Decodes pictures of the reveal, within a share of the time."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.spent = 0.0
        self.last = float("-inf")

    def of(self, step: RevealStep) -> list[str] | None:
        """Return data URLs of the pictures after a step; None: not now."""
        from mar.pipeline import to_pil

        now = time.perf_counter()
        if step.step > 1 and (
            now - self.last < PREVIEW_INTERVAL_S or self.spent > PREVIEW_SHARE * (now - self.started)
        ):
            return None
        urls = [preview_url(image) for image in to_pil(step.decode())]
        self.last = time.perf_counter()
        self.spent += self.last - now
        return urls


def _label(pipeline: Pipeline, number: int | None) -> str | None:
    """Return the name of a class, or its number if the name is another's too or means no class; None: no class."""
    if number is None:
        return None
    names = pipeline.classes
    is_own = names is not None and names.count(names[number]) == 1 and names[number].lower() != "none"
    return names[number] if names is not None and is_own else str(number)


def _describe(pipeline: Pipeline) -> dict[str, Any]:
    """Return what the page needs of a model."""
    from mar.data.labels import all_names

    config = pipeline.model.config
    height, width = pipeline.image_size
    rows, columns = config.token_grid
    names = all_names(pipeline.classes) or [(str(number),) for number in range(config.classes)]
    classes = {  # the conditions that one chooses from: a class, by any of its names
        "kind": "class" if config.classes else "none",
        "names": list(pipeline.classes or map(str, range(config.classes))),
        "aliases": [" ".join(each[1:]) for each in names],
    }
    return {
        "asks": describe_prompts(pipeline) if pipeline.captions else classes,
        "width": width, "height": height, "rows": rows, "columns": columns,
        "guidable": config.guidable,
        "parameters": sum(parameter.numel() for parameter in pipeline.model.parameters()),
        "device": str(pipeline.device),
        "defaults": {each: to_dict(pipeline.sampling_with(each)) for each in PRESETS},
    }  # fmt: skip


def _restored(pipeline: Pipeline, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a PNG was drawn with. Raises ValueError if its settings do not fit this model."""
    names = {*renamed_fields(SamplingConfig), *(setting["name"] for setting in words.describe_settings())}
    settings = rename_old_keys(SamplingConfig, {name: facts[name] for name in names & facts.keys()})
    sampling = pipeline.sampling_with(None, **words.read_settings(settings))
    changed = {each: words.changed_settings(pipeline, each, sampling) for each in PRESETS}
    preset = min(PRESETS, key=lambda each: len(changed[each]))
    label, prompt, seed = facts.get("label"), facts.get("prompt"), facts.get("seed")
    classes = pipeline.model.config.classes
    condition = (
        {"prompt": prompt if isinstance(prompt, str) and len(prompt) <= MAX_PROMPT else None} if pipeline.captions
        else {"label": label if type(label) is int and 0 <= label < classes else None}
    )  # fmt: skip
    return {
        "model": str(facts.get("model", ""))[:200],
        **condition,
        "seed": seed if type(seed) is int and 0 <= seed < 2**63 else 0,
        "preset": preset,
        "settings": changed[preset],
    }


def _unrepeatable(facts: Mapping[str, Any], model: Model) -> str:
    """Return why the settings in a PNG do not make it again with a model; "": they do."""
    for marks, why in _UNREPEATABLE.items():
        if marks & facts.keys():
            return why
    weights = facts.get("weights")
    return "it was drawn by other weights, and Draw makes another" if weights not in (None, model.fingerprint) else ""


def _missing(name: str) -> list[RemoteFile]:
    """List the files that a published model needs and that are not here."""
    from mar.checkpoint.download import missing
    from mar.published import PUBLISHED

    return missing(name) if name in PUBLISHED else []


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
