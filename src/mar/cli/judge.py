"""What `mar evaluate` holds on to while it judges: networks, model, reference, held-out pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mar.cli.features import Split, progress, say_memory
from mar.cli.options import one_voice
from mar.config import ConfigError, to_dict

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from mar.cli.evaluate import EvaluateOptions
    from mar.evaluation.evaluate import Collected, Report
    from mar.evaluation.features import Extractor
    from mar.evaluation.neighbours import HeldOut
    from mar.evaluation.statistics import Statistics
    from mar.evaluation.streams import PictureSet
    from mar.pipeline import Pipeline


class Judge:
    """What stays the same from one set of pictures to the next: networks, model, reference.

    All is opened and checked before the first picture is drawn.
    """

    reference: Statistics
    held_out: HeldOut | None = None

    def __init__(self, options: EvaluateOptions, device: torch.device, check: Callable[[], None]) -> None:
        from mar.evaluation.evaluate import Wanted
        from mar.evaluation.features import open_extractor
        from mar.evaluation.inputs import is_pictures, open_either

        self.options, self.check = options, check
        self.model, self.given, size = None, None, options.size()
        if not is_pictures(options.what):
            self.model = self._load(device)
            size = self.model.image_size
        elif options.sweep:
            raise ConfigError(f"a sweep compares ways of drawing, but {options.what} is no model")
        neighbours = options.neighbours or options.held_out is not None or options.neighbours_grid is not None
        self.wanted = Wanted(options.kid, options.precision, options.splits, neighbours)
        self.extractor = options.extractor(device)
        self.classifier = (
            open_extractor(options.classifier, options.classifier_weights).to(device) if options.classifier else None
        )
        if self.model is None:
            self._require_nothing_drawn()
            self.given = open_either(options.what, self.extractor, self.wanted, size=size, limit=options.count)
            self._require_pictures()

        def opened(spec: str, split: Split) -> Statistics | PictureSet:
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
        from mar.evaluation.statistics import Statistics

        if not isinstance(self.given, Statistics):
            return
        for name in ("classifier", "count"):
            if getattr(self.options, name) is not None:
                raise ConfigError(f"{name} needs pictures, but {self.options.what} has only their statistics")

    def _require_shared_classes(self) -> None:
        """ValueError for a classifier that knows none of the classes, before the reference is looked at."""
        from mar.evaluation.agreement import Agreement
        from mar.evaluation.statistics import Statistics

        pictures = self._drawn({}) if self.given is None else self.given
        if self.classifier is not None and not isinstance(pictures, Statistics):
            Agreement(pictures, self.extractor, self.classifier)

    def measure_reference(self) -> None:
        """Looks at the reference's pictures, unless it is statistics; and at those that are held out."""
        from mar.evaluation.neighbours import HeldOut

        self.reference = self._collect(self.opened, None).statistics
        if self.opened_held_out is not None:
            held_out = self._collect(self.opened_held_out, None).statistics
            with one_voice():
                self.held_out = HeldOut.of(held_out, self.reference)

    def report(self, **point: Any) -> Report:
        """On the pictures that are there, or on those drawn with the settings of `point`."""
        from mar.evaluation.evaluate import compare

        collected = self._collect(self._drawn(point) if self.given is None else self.given, self.classifier)
        with one_voice():
            return compare(collected, self.reference, self.extractor, self.wanted, self.held_out)

    def grid(self, report: Report) -> Image.Image | None:
        """The nearest pairs as a picture, where that was asked for."""
        from mar.evaluation.neighbours import sheet
        from mar.evaluation.statistics import Statistics

        if self.options.neighbours_grid is None:
            return None
        pictures = self._drawn({}) if self.given is None else self.given
        assert not isinstance(pictures, Statistics)  # `_check_grid`
        assert not isinstance(self.opened, Statistics)
        return sheet(report.pairs, pictures, self.opened)

    def _collect(self, opened: Statistics | PictureSet, classifier: Extractor | None) -> Collected:
        from mar.evaluation.evaluate import Collected, collect
        from mar.evaluation.statistics import Statistics
        from mar.evaluation.streams import DrawnPictures

        if isinstance(opened, Statistics):
            return Collected(opened)
        if self.wanted.features:
            say_memory(len(opened), self.extractor)
        with one_voice(), progress(len(opened), self.check) as advance:
            if isinstance(opened, DrawnPictures):
                opened.advance = advance
            return collect(
                opened, self.extractor, wanted=self.wanted, classifier=classifier, batch=self.options.batch,
                advance=advance,
            )  # fmt: skip

    def _drawn(self, point: dict[str, Any]) -> PictureSet:
        from mar.evaluation.streams import DrawnPictures

        assert self.model is not None
        return DrawnPictures(
            self.model, self.plan, name=self.options.what, allow_broken=self.options.allow_broken,
            advance=lambda done: self.check(), **{**self.options.settings(), **point},
        )  # fmt: skip

    def settings(self, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What the numbers of a sweep over `points` depend on, beside the point."""
        from mar.evaluation.statistics import Statistics
        from mar.evaluation.streams import digest

        def named(opened: Statistics | PictureSet, spec: str) -> tuple[str, int | None, str]:
            if isinstance(opened, Statistics):
                return opened.about.source if opened.about else spec, opened.count, opened.digest()
            return opened.name, len(opened), digest(opened)

        options, model, held_out = self.options, self.model, self.opened_held_out
        assert model is not None
        source, count, held = named(self.opened, options.reference)
        *others, held_others = (None, None) if held_out is None else named(held_out, str(options.held_out))
        sampling = to_dict(model.sampling_with(**options.settings()))
        return {
            "weights": model.fingerprint(), "pictures": len(self.plan), "seed": options.seed, "dtype": options.dtype,
            "tf32": options.tf32, "features": self.extractor.fingerprint, "reference": source,
            "reference_pictures": count, "kid": options.kid, "precision": options.precision, "splits": options.splits,
            # None is as good as missing: sweeps of before there were neighbours go on
            "neighbours": self.wanted.neighbours or None,
            "held_out": None if held_out is None else others,
            "reference_digest": held, "held_out_digest": held_others,
            "classifier": self.classifier and self.classifier.fingerprint, "swept": ", ".join(sorted(points[0])),
            **{name: value for name, value in sampling.items() if name not in points[0]},
        }  # fmt: skip
