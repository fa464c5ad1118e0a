"""Evaluation sessions: a reference is opened and measured once, then many sets of images are held against it.

`EvalSession` serves `mar evaluate`: one report, or one for each point of a sweep. `OnlineEvaluator` evaluates a model
during training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mar import distributed
from mar.config import ConfigError
from mar.data.accounts import log_once
from mar.data.captions import Captions, captions_of, pick_caption
from mar.data.conditions import CaptionReader
from mar.data.splits import stratified_indices
from mar.evaluation.class_accuracy import ClassAccuracy
from mar.evaluation.evaluate import Collected, MetricOptions, Report, collect, compare, print_feature_memory
from mar.evaluation.features import Extractor
from mar.evaluation.image_sets import (
    GeneratedImages,
    ImageSet,
    NpzImages,
    SourceImages,
    digest,
    has_test_split,
    is_statistics,
    open_images,
    rank_share,
)
from mar.evaluation.neighbors import HeldOut, pair_grid
from mar.evaluation.statistics import FeatureStats, StatsProvenance, check_comparable
from mar.evaluation.sweep import fixed_settings
from mar.pipeline import Pipeline
from mar.sampling.plan import Plan
from mar.sampling.progress import rank_meter

# ---- Statistics or images by name


def open_statistics(
    path: Path, extractor: Extractor, options: MetricOptions, *, size: tuple[int, int] | None = None
) -> FeatureStats:
    """Reads statistics, and checks them before anything is drawn.

    Args:
        path: a file of `FeatureStats.save`, or of ADM.
        extractor: the network of the features to compare with.
        options: the metrics to compute.
        size: height and width of the images to compare with, if known.

    Raises:
        ValueError: for statistics of another extractor or size, or without the features that are needed.
    """
    stats = FeatureStats.load(path, features=options.needs_features)
    if len(stats.mean) != extractor.width:
        raise ValueError(
            f"{path}: got statistics of {len(stats.mean)} features, expected {extractor.width} of {extractor.name}; "
            "choose the --features they were made with"
        )
    if stats.provenance is not None:
        expected_size = size or stats.provenance.size
        own = StatsProvenance(extractor.name, extractor.fingerprint, expected_size, "the set to compare it with")
        check_comparable(replace(stats.provenance, source=str(path)), own)
    if options.needs_features and stats.features is None:
        raise ValueError(
            f"KID, precision, recall and neighbors need the features of all pictures, and {path} has only their mean "
            "and covariance: give the pictures, or statistics that `mar stats --keep-features` made"
        )
    return stats


def open_either(
    spec: str,
    extractor: Extractor,
    options: MetricOptions,
    *,
    split: str = "train",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    upright: bool = False,
) -> FeatureStats | ImageSet:
    """Opens the statistics in a file (`open_statistics`), or the images called `spec` (`open_images`).

    Args:
        spec: an `.npz` of statistics, or anything that `open_images` takes.
        extractor: the network of the features to compare with.
        options: the metrics to compute.
        split: the part of a source that has several.
        size: height and width of the images.
        limit: at most so many images.
        upright: turn a source's images upright by their EXIF orientation.
    """
    if is_statistics(spec):
        return open_statistics(Path(spec), extractor, options, size=size)
    return open_images(spec, split=split, size=size, limit=limit, upright=upright)


# ---- Prompts of models that draw from words


def reference_captions(reference: FeatureStats | ImageSet) -> Captions:
    """Returns the captions of a reference's images; empty for statistics, and images without."""
    return captions_of(reference.source) if isinstance(reference, SourceImages) else ()


def spread_prompts(captions: Captions, reader: CaptionReader, count: int | None, seed: int = 0) -> list[str]:
    """Returns captions of `count` images, spread evenly over all.

    Args:
        captions: of each image; those without are left out.
        reader: the model's; captions that it can't read are left out.
        count: number of images (None: all).
        seed: chooses among the captions of an image.
    """
    one_each = [pick_caption(each, seed, position) for position, each in enumerate(captions) if each]
    chosen = stratified_indices(len(one_each), len(one_each) if count is None else count)
    return reader.readable([one_each[int(index)] for index in chosen])


# ---- A session of `mar evaluate`


@dataclass(frozen=True)
class EvalOptions:
    """The settings of a session."""

    source: str
    """Source of the evaluated images: a set of images, an `.npz` of statistics, or the name of the model."""
    reference: str
    """Real images, or an `.npz` of their statistics."""
    reference_split: str = "test"
    """The part of a reference that has several."""
    held_out: str | None = None
    """Real images that the model was not trained on, as for reference: adds the share of copies."""
    held_out_split: str = "test"
    metrics: MetricOptions = field(default_factory=MetricOptions)
    count: int | None = None
    """Images to evaluate. None: 50 of each class of a model, one of each prompt, or the whole set."""
    seed: int = 0
    prompts: Sequence[str | None] | None = None
    """Prompts of a model that draws from words. None: the captions of the reference."""
    image_size: tuple[int, int] | None = None
    """Height and width to crop a source's images to. None: the model's, or as they are."""
    upright: bool = False
    """Turn a source's images upright by their EXIF orientation."""
    batch: int = 64
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `Pipeline.sampling_with`."""
    allow_broken: bool = False
    """Go on where a model draws latents that are no image."""


def _check_same_size(sides: Sequence[FeatureStats | ImageSet]) -> None:
    """Raises ValueError for sets of different sizes, as far as these are known before any image is measured."""
    sizes: list[tuple[str, int, int]] = []
    for side in sides:
        if isinstance(side, FeatureStats) and side.provenance is not None:
            sizes.append((side.provenance.source, *side.provenance.size))
        elif isinstance(side, NpzImages):
            sizes.append((side.name, *side.shape[1:3]))
        elif isinstance(side, SourceImages):
            sizes += [(side.name, *batch.images.shape[2:]) for batch in side.batches(1, 0, 1) if len(batch.images)]
    if len({(height, width) for _, height, width in sizes}) > 1:
        listed = ", ".join(f"{name} {height}x{width}" for name, height, width in sizes)
        raise ValueError(f"got pictures of different sizes: {listed}; give --image-size, or make one of them again")


class EvalSession:
    """An evaluation; everything is opened and checked before the first image is drawn.

    Args:
        options: the settings.
        extractor: the feature network.
        model: draws the images; without it they are those of `options.source`.
        classifier: judges their classes (`collect`).
        check: is called now and then; may raise to stop the session.

    Raises:
        ValueError: for sets that can't be opened, or that don't fit each other, the model or the networks.
    """

    def __init__(
        self, options: EvalOptions, extractor: Extractor, *, model: Pipeline | None = None,
        classifier: Extractor | None = None, check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.options, self.extractor, self.model = options, extractor, model
        self.classifier, self.check = classifier, check
        self.metrics = replace(options.metrics, neighbors=options.metrics.neighbors or options.held_out is not None)
        self.size = options.image_size
        if model is None:
            self.images = open_either(
                options.source, extractor, self.metrics, size=self.size, limit=options.count, upright=options.upright
            )
            self.reference_set = self._open(options.reference, options.reference_split)
        else:
            self._check_model(model)
            self.size = model.image_size
            self.reference_set = self._open(options.reference, options.reference_split)
            self.plan = self._plan(model)
            self.images = self._generate({})
        if classifier is not None and not isinstance(self.images, FeatureStats):
            ClassAccuracy(self.images, extractor, classifier)  # raises for a classifier without a shared class
        self.held_out_set = None if options.held_out is None else self._open(options.held_out, options.held_out_split)
        sides = [self.images, self.reference_set, *([] if self.held_out_set is None else [self.held_out_set])]
        if options.upright and not any(isinstance(side, SourceImages) for side in sides):
            raise ConfigError(
                "upright: got no folder or other source of pictures, expected one; those of statistics are turned by "
                "`mar stats --upright`"
            )
        _check_same_size(sides)
        self.reference: FeatureStats | None = None
        self.reference_numbers: Int[Tensor, " n"] | None = None
        self.held_out: HeldOut | None = None
        self._reference_warnings: tuple[str, ...] = ()

    def _check_model(self, model: Pipeline) -> None:
        options = self.options
        model.sampling_with(**options.sampling)  # raises for settings that the model can't follow
        size, expected = options.image_size, model.image_size
        if size is not None and size != expected:
            raise ConfigError(
                f"image-size: got {size[0]}x{size[1]}, but {options.source} draws {expected[0]}x{expected[1]}; "
                "leave it out"
            )
        if model.captions is not None and self.classifier is not None:
            raise ConfigError(
                f"classifier: class accuracy needs a model of classes, but {options.source} draws from words; leave it "
                "out"
            )

    def _plan(self, model: Pipeline) -> Plan:
        """Plans the images. Raises ValueError for prompts that the model can't draw, or if there are none."""
        options = self.options
        if options.prompts is not None:
            model.reader.validate(None, options.prompts)
        if model.captions is not None:
            if options.prompts is None:
                captions = reference_captions(self.reference_set)
                prompts = spread_prompts(captions, model.captions, options.count, options.seed)
            else:
                prompts = [prompt or "" for prompt in options.prompts]
            if not prompts:
                raise ConfigError(
                    f"{options.source} draws from words, but {options.reference} has no captions to draw; give "
                    "--prompts FILE, with a prompt a line"
                )
            return Plan.total(len(prompts) if options.count is None else options.count, prompts, options.seed)
        classes = list(range(model.model.config.classes)) or [-1]
        if options.count is None:
            return Plan.per_class(50, classes, options.seed)
        return Plan.total(options.count, classes, options.seed)

    def _open(self, spec: str, split: str) -> FeatureStats | ImageSet:
        return open_either(
            spec, self.extractor, self.metrics, split=split, size=self.size, upright=self.options.upright
        )

    def _generate(self, point: Mapping[str, Any]) -> GeneratedImages:
        assert self.model is not None
        return GeneratedImages(
            self.model, self.plan, name=self.options.source, allow_broken=self.options.allow_broken,
            advance=lambda done: self.check(), **{**self.options.sampling, **point},
        )  # fmt: skip

    def measure_reference(self) -> None:
        """Computes the statistics of reference and held-out images; files have them already."""
        collected = self._collect(self.reference_set, None)
        self.reference, self.reference_numbers = collected.statistics, collected.numbers
        self._reference_warnings = collected.warnings
        if self.held_out_set is not None:
            held_out = self._collect(self.held_out_set, None)
            self._reference_warnings += held_out.warnings
            with distributed.collective_errors():
                self.held_out = HeldOut.of(held_out.statistics, self.reference)

    def report(self, **point: Any) -> Report:
        """Evaluates the images; a model draws them with the settings of `point`."""
        if self.reference is None:
            self.measure_reference()
        assert self.reference is not None
        collected = self._collect(self._generate(point) if self.model else self.images, self.classifier)
        with distributed.collective_errors():
            report = compare(
                collected, self.reference, self.extractor, self.metrics, self.held_out, self.reference_numbers
            )
        return replace(report, warnings=(*self._reference_warnings, *report.warnings))

    def _collect(self, images: FeatureStats | ImageSet, classifier: Extractor | None) -> Collected:
        if isinstance(images, FeatureStats):
            return Collected(images)
        if self.metrics.needs_features:
            print_feature_memory(len(images), self.extractor)
        first, end = rank_share(len(images), distributed.rank(), distributed.world_size())
        with distributed.collective_errors(), rank_meter(end - first, len(images), check=self.check) as advance:
            if isinstance(images, GeneratedImages):
                images.advance = advance
            return collect(
                images, self.extractor, options=self.metrics, classifier=classifier, batch=self.options.batch,
                advance=advance,
            )  # fmt: skip

    def pair_grid(self, report: Report) -> Image.Image:
        """Draws the report's nearest pairs. Both sides have to be images, not statistics."""
        assert not isinstance(self.images, FeatureStats)
        assert not isinstance(self.reference_set, FeatureStats)
        return pair_grid(report.pairs, self.images, self.reference_set)

    def sweep_settings(self, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns all that reports of a sweep depend on, beside the point."""
        options, model = self.options, self.model
        assert model is not None

        def identify(images: FeatureStats | ImageSet | None, spec: str | None) -> tuple[str | None, int | None, Any]:
            if images is None:
                return None, None, None
            if isinstance(images, FeatureStats):
                return images.provenance.source if images.provenance else spec, images.count, images.digest()
            return images.name, len(images), digest(images)

        reference, reference_count, reference_digest = identify(self.reference_set, options.reference)
        *held_out, held_out_digest = identify(self.held_out_set, options.held_out)
        sampling = fixed_settings(model.sampling_with(**options.sampling), points[0])
        return {
            "weights": model.fingerprint(), "pictures": len(self.plan), "seed": options.seed,
            "features": self.extractor.fingerprint, "reference": reference, "reference_pictures": reference_count,
            "kid": self.metrics.kid, "precision": self.metrics.precision, "splits": self.metrics.splits,
            # None is as good as missing: sweeps from before these settings go on
            "neighbours": self.metrics.neighbors or None,
            "held_out": None if self.held_out_set is None else held_out,
            "reference_digest": reference_digest, "held_out_digest": held_out_digest,
            "classifier": self.classifier and self.classifier.fingerprint, "swept": ", ".join(sorted(points[0])),
            **({"prompts": self.plan.fingerprint()} if self.plan.has_prompts else {}),
            **({"upright": True} if options.upright else {}),
            **sampling,
        }  # fmt: skip


# ---- Evaluation during training


@dataclass
class OnlineEvaluator:
    """Compares `count` images of a model with a reference; classes or prompts take turns, seeds stay the same."""

    extractor: Extractor
    reference: str
    """An `.npz` of statistics, or images; of a data source its test part, if there is one."""
    count: int
    batch: int = 64
    upright: bool = False
    """Turn the reference's images upright by their EXIF orientation, as the run's are."""
    captions: Captions = ()
    """Prompts of a model that draws from words, where the reference has no captions."""

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"images of an evaluation: got {self.count}, expected at least 2")
        self._stats: FeatureStats | None = None
        self._prompts: list[str] | None = None

    def measure_reference(self, size: tuple[int, int]) -> FeatureStats:
        """Returns the reference's statistics at `size` (height, width); reads or measures them the first time."""
        if self._stats is None:
            opened = self.open_reference(size)
            self.captions = reference_captions(opened) or self.captions
            if isinstance(opened, FeatureStats):
                self._stats = opened
            else:
                collected = collect(opened, self.extractor, batch=self.batch)
                for line in collected.warnings:
                    log_once(logging.WARNING, line)
                self._stats = collected.statistics
        return self._stats

    def open_reference(self, size: tuple[int, int]) -> FeatureStats | ImageSet:
        """Opens the reference at `size`. Raises ValueError if there is none, or if it can't be compared."""
        split = "test" if is_statistics(self.reference) or has_test_split(self.reference) else "train"
        return open_either(
            self.reference, self.extractor, MetricOptions(), split=split, size=size, upright=self.upright
        )

    def check(self, model: Pipeline) -> None:
        """Measures the reference at the size of `model`. Raises ValueError if they can't be compared."""
        self.measure_reference(model.image_size)
        self._asks(model)

    def __call__(self, model: Pipeline) -> Report:
        """Reports on images that `model` draws with its own sampling settings. Raises BrokenLatents for no images."""
        reference = self.measure_reference(model.image_size)
        plan = Plan.total(self.count, self._asks(model))
        images = GeneratedImages(model, plan, name="the run's model")
        return compare(collect(images, self.extractor, batch=self.batch), reference, self.extractor, MetricOptions())

    def _asks(self, model: Pipeline) -> list[int] | list[str]:
        """Returns the classes or prompts that take turns. ConfigError for a model of words without prompts."""
        if model.captions is None:
            return list(range(model.model.config.classes)) or [-1]
        if self._prompts is None:
            self._prompts = spread_prompts(self.captions, model.captions, self.count)
        if not self._prompts:
            raise ConfigError(f"the model draws from words, but {self.reference} has no captions; give another one")
        return self._prompts
