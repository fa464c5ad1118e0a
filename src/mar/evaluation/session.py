"""What people name on the command line -> sets of pictures and reference statistics.

Judging a model while it learns: the same pictures, the same reference, again and again.

What `mar evaluate` holds on to while it judges: networks, model, reference, held-out pictures.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mar import distributed
from mar.cli.stats import Split, progress, say_memory
from mar.config import ConfigError
from mar.data.paths import SHARD_SUFFIXES
from mar.data.sources import open_source
from mar.evaluation.evaluate import Advance, MetricOptions, Report, collect, compare
from mar.evaluation.features import Extractor
from mar.evaluation.image_sets import DrawnPictures, NpzPictures, PictureSet, SourcePictures
from mar.evaluation.statistics import FeatureStats, StatsProvenance, check_comparable
from mar.pipeline import WEIGHTS_FILE, Pipeline
from mar.sampling.plan import Plan
from mar.zoo import BUNDLED

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mar.cli.evaluate import EvaluateOptions
    from mar.evaluation.evaluate import Collected, Report
    from mar.evaluation.features import Extractor
    from mar.evaluation.image_sets import PictureSet
    from mar.evaluation.neighbors import HeldOut
    from mar.evaluation.statistics import FeatureStats
    from mar.pipeline import Pipeline

RUN_FILE = "run.json"
"""What tells the folder of a run (`mar.training.run`, which this room does not know)."""


def is_statistics(spec: str) -> bool:
    """Whether `spec` is an `.npz` that holds statistics rather than pictures."""
    path = Path(spec)
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except zipfile.BadZipFile:
        return False  # what is wrong with it is said by who opens it


def is_pictures(spec: str) -> bool:
    """Whether `spec` is an `.npz`, a Parquet or .tar file, or a folder without a model in it.

    The name of a bundled model is not, whatever folder there is: to `zoo.load` it means the model.
    """
    if spec in BUNDLED:
        return False
    path = Path(spec)
    return path.suffix in (".npz", *SHARD_SUFFIXES) or (path.is_dir() and not (path / WEIGHTS_FILE).exists())


def open_pictures(
    spec: str, *, split: str = "train", size: tuple[int, int] | None = None, limit: int | None = None
) -> PictureSet:
    """The pictures of an `.npz`, or of a data source as `open_source` knows them. ValueError where there are none.

    The folder of a run is refused: what pictures it has were drawn, or looked at, on the way.

    `size` (height, width) is what those of a source are brought to; an `.npz` has to have it already.
    """
    path = Path(spec)
    if (path / RUN_FILE).is_file():
        raise ValueError(
            f"{path} is the folder of a run, whose pictures are samples of its training; expected a folder of "
            f"pictures, or the model of a run that has saved its {WEIGHTS_FILE}"
        )
    if path.suffix != ".npz":
        return SourcePictures(open_source(spec, split), f"{spec} ({split})", size=size, limit=limit)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    found = NpzPictures(path, limit=limit)
    if size is not None and found.shape[1:3] != size:
        have, want = ("x".join(map(str, pair)) for pair in (found.shape[1:3], size))
        raise ValueError(f"{path} has pictures of {have} pixels, expected {want}; make it again at that size")
    return found


def open_statistics(
    path: Path, extractor: Extractor, wanted: MetricOptions, *, size: tuple[int, int] | None = None
) -> FeatureStats:
    """The file's statistics. ValueError where they lack what is `wanted`, or are of another extractor.

    `size` (height, width) is that of the pictures they will be held against, where it is known: so that nothing is
    drawn that can't be compared.
    """
    found = FeatureStats.load(path, features=wanted.features)
    if len(found.mean) != extractor.width:
        raise ValueError(
            f"{path} has statistics of {len(found.mean)} features, but {extractor.name} has {extractor.width}; "
            "choose the --features they were made with"
        )
    if found.about is not None:
        own = StatsProvenance(
            extractor.name, extractor.fingerprint, size or found.about.size, "what it is held against"
        )
        check_comparable(replace(found.about, source=str(path)), own)
    if wanted.features and found.features is None:
        raise ValueError(
            f"KID, precision, recall and neighbours need the features of all pictures, and {path} has only their mean "
            "and covariance: give the pictures, or statistics that `mar stats --keep-features` made"
        )
    return found


def open_either(
    spec: str, extractor: Extractor, wanted: MetricOptions, *, split: str = "train",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
) -> FeatureStats | PictureSet:  # fmt: skip
    """The statistics in a file (`open_statistics`), or the pictures that `spec` names (`open_pictures`)."""
    if is_statistics(spec):
        return open_statistics(Path(spec), extractor, wanted, size=size)
    return open_pictures(spec, split=split, size=size, limit=limit)


def open_reference(
    spec: str, extractor: Extractor, wanted: MetricOptions, *, split: str = "train",
    size: tuple[int, int] | None = None,
    batch: int = 64, advance: Advance | None = None,
) -> FeatureStats:  # fmt: skip
    """Statistics from a file, or measured now from the pictures that `spec` names, of which features are `wanted`."""
    found = open_either(spec, extractor, wanted, split=split, size=size)
    if isinstance(found, FeatureStats):
        return found
    return collect(found, extractor, wanted=wanted, batch=batch, advance=advance).statistics


@dataclass
class OnlineEvaluator:
    """Draws `count` pictures, the classes in turns and seeds always the same, and holds them against a reference."""

    extractor: Extractor
    reference: str
    """As `open_reference` takes it: statistics, or pictures; of these those for testing, where there are any."""
    count: int
    batch: int = 64

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"pictures of an evaluation: got {self.count}, expected at least 2")
        self.measured: FeatureStats | None = None

    def measure(self, size: tuple[int, int]) -> FeatureStats:
        """The reference, at `size` (height, width); measured or read the first time."""
        if self.measured is None:
            split = "test" if is_statistics(self.reference) or has_test_split(self.reference) else "train"
            self.measured = open_reference(
                self.reference, self.extractor, MetricOptions(), split=split, size=size, batch=self.batch
            )
        return self.measured

    def __call__(self, model: Pipeline) -> Report:
        """The report on what `model` draws with its own sampling settings. BrokenLatents where that is no picture."""
        reference = self.measure(model.image_size)
        plan = Plan.total(self.count, list(range(model.model.config.classes)) or [-1])
        pictures = DrawnPictures(model, plan, name="the run's model")
        found = collect(pictures, self.extractor, batch=self.batch)
        return compare(found, reference, self.extractor, MetricOptions())


def has_test_split(data: str) -> bool:
    """Whether `data` (see `open_source`) has pictures of its own for testing."""
    try:
        open_source(data, "test")
    except ValueError:
        return False
    return True


class EvalSession:
    """What stays the same from one set of pictures to the next: networks, model, reference.

    All is opened and checked before the first picture is drawn.
    """

    reference: FeatureStats
    held_out: HeldOut | None = None

    def __init__(self, options: EvaluateOptions, device: torch.device, check: Callable[[], None]) -> None:
        from mar.evaluation.evaluate import MetricOptions
        from mar.evaluation.features import open_extractor

        self.options, self.check = options, check
        self.model, self.given, size = None, None, options.size()
        if not is_pictures(options.what):
            self.model = self._load(device)
            size = self.model.image_size
        elif options.sweep:
            raise ConfigError(f"a sweep compares ways of drawing, but {options.what} is no model")
        neighbours = options.neighbours or options.held_out is not None or options.neighbours_grid is not None
        self.wanted = MetricOptions(options.kid, options.precision, options.splits, neighbours)
        self.extractor = options.extractor(device)
        self.classifier = (
            open_extractor(options.classifier, options.classifier_weights).to(device) if options.classifier else None
        )
        if self.model is None:
            self._require_nothing_drawn()
            self.given = open_either(options.what, self.extractor, self.wanted, size=size, limit=options.count)
            self._require_pictures()

        def opened(spec: str, split: Split) -> FeatureStats | PictureSet:
            return open_either(spec, self.extractor, self.wanted, split=split, size=size)

        self._require_shared_classes()
        self.opened = opened(options.reference, options.reference_split)
        self.opened_held_out = None if options.held_out is None else opened(options.held_out, options.held_out_split)

    def _load(self, device: torch.device) -> Pipeline:
        from mar.sampling.plan import Plan

        options = self.options
        model = options.load(options.what, device)
        model.sampling_with(**options.settings())
        if options.size() not in (None, model.image_size):
            height, width = model.image_size
            raise ConfigError(f"image-size is {options.image_size}, but {options.what} draws {height}x{width}")
        classes = list(range(model.model.config.classes)) or [-1]
        if options.count is None:
            self.plan = Plan.per_class(50, classes, options.seed)
        else:
            self.plan = Plan.total(options.count, classes, options.seed)
        return model

    def _require_nothing_drawn(self) -> None:
        options = self.options
        given = [*options.settings(), *(n for n in ("seed", "tf32", "allow_broken") if getattr(options, n))]
        given += ["dtype"] if options.dtype != "fp32" else []
        if given:
            name = given[0].replace("_", "-")
            raise ConfigError(f"{name} is of drawing, but {options.what} is no model; leave --{name} out")

    def _require_pictures(self) -> None:
        from mar.evaluation.statistics import FeatureStats

        if not isinstance(self.given, FeatureStats):
            return
        for name in ("classifier", "count"):
            if getattr(self.options, name) is not None:
                raise ConfigError(f"{name} needs pictures, but {self.options.what} has only their statistics")

    def _require_shared_classes(self) -> None:
        """ValueError for a classifier that knows none of the classes, before the reference is looked at."""
        from mar.evaluation.class_accuracy import ClassAccuracy
        from mar.evaluation.statistics import FeatureStats

        pictures = self._drawn({}) if self.given is None else self.given
        if self.classifier is not None and not isinstance(pictures, FeatureStats):
            ClassAccuracy(pictures, self.extractor, self.classifier)

    def measure_reference(self) -> None:
        """Looks at the reference's pictures, unless it is statistics; and at those that are held out."""
        from mar.evaluation.neighbors import HeldOut

        self.reference = self._collect(self.opened, None).statistics
        if self.opened_held_out is not None:
            held_out = self._collect(self.opened_held_out, None).statistics
            with distributed.collective_errors():
                self.held_out = HeldOut.of(held_out, self.reference)

    def report(self, **point: Any) -> Report:
        """On the pictures that are there, or on those drawn with the settings of `point`."""
        from mar.evaluation.evaluate import compare

        collected = self._collect(self._drawn(point) if self.given is None else self.given, self.classifier)
        with distributed.collective_errors():
            return compare(collected, self.reference, self.extractor, self.wanted, self.held_out)

    def grid(self, report: Report) -> Image.Image | None:
        """The nearest pairs as a picture, where that was asked for."""
        from mar.evaluation.neighbors import sheet
        from mar.evaluation.statistics import FeatureStats

        if self.options.neighbours_grid is None:
            return None
        pictures = self._drawn({}) if self.given is None else self.given
        assert not isinstance(pictures, FeatureStats)  # `_check_grid`
        assert not isinstance(self.opened, FeatureStats)
        return sheet(report.pairs, pictures, self.opened)

    def _collect(self, opened: FeatureStats | PictureSet, classifier: Extractor | None) -> Collected:
        from mar.evaluation.evaluate import Collected, collect
        from mar.evaluation.image_sets import DrawnPictures
        from mar.evaluation.statistics import FeatureStats

        if isinstance(opened, FeatureStats):
            return Collected(opened)
        if self.wanted.features:
            say_memory(len(opened), self.extractor)
        with distributed.collective_errors(), progress(len(opened), self.check) as advance:
            if isinstance(opened, DrawnPictures):
                opened.advance = advance
            return collect(
                opened, self.extractor, wanted=self.wanted, classifier=classifier, batch=self.options.batch,
                advance=advance,
            )  # fmt: skip

    def _drawn(self, point: dict[str, Any]) -> PictureSet:
        from mar.evaluation.image_sets import DrawnPictures

        assert self.model is not None
        return DrawnPictures(
            self.model, self.plan, name=self.options.what, allow_broken=self.options.allow_broken,
            advance=lambda done: self.check(), **{**self.options.settings(), **point},
        )  # fmt: skip

    def settings(self, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the numbers of a sweep over `points` depend on, beside the point."""
        from mar.evaluation.image_sets import digest
        from mar.evaluation.statistics import FeatureStats
        from mar.evaluation.sweep import fixed_settings

        def named(opened: FeatureStats | PictureSet, spec: str) -> tuple[str, int | None, str]:
            if isinstance(opened, FeatureStats):
                return opened.about.source if opened.about else spec, opened.count, opened.digest()
            return opened.name, len(opened), digest(opened)

        options, model, held_out = self.options, self.model, self.opened_held_out
        assert model is not None
        source, count, held = named(self.opened, options.reference)
        *others, held_others = (None, None) if held_out is None else named(held_out, str(options.held_out))
        return {
            "weights": model.fingerprint(), "pictures": len(self.plan), "seed": options.seed, "dtype": options.dtype,
            "tf32": options.tf32, "features": self.extractor.fingerprint, "reference": source,
            "reference_pictures": count, "kid": options.kid, "precision": options.precision, "splits": options.splits,
            # None is as good as missing: sweeps of before there were neighbours go on
            "neighbours": self.wanted.neighbours or None,
            "held_out": None if held_out is None else others,
            "reference_digest": held, "held_out_digest": held_others,
            "classifier": self.classifier and self.classifier.fingerprint, "swept": ", ".join(sorted(points[0])),
            **fixed_settings(model.sampling_with(**options.settings()), points[0]),
        }  # fmt: skip
