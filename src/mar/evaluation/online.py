"""Judging a model while it learns: the same pictures, the same reference, again and again."""

from __future__ import annotations

from dataclasses import dataclass

from mar.data.sources import open_source
from mar.evaluation.evaluate import Report, Wanted, collect, compare
from mar.evaluation.features import Extractor
from mar.evaluation.inputs import is_statistics, open_reference
from mar.evaluation.statistics import Statistics
from mar.evaluation.streams import DrawnPictures
from mar.pipeline import Pipeline
from mar.sampling.plan import Plan


@dataclass
class Online:
    """Draws `count` pictures, the classes in turns and seeds always the same, and holds them against a reference."""

    extractor: Extractor
    reference: str
    """As `open_reference` takes it: statistics, or pictures; of these those for testing, where there are any."""
    count: int
    batch: int = 64

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"pictures of an evaluation: got {self.count}, expected at least 2")
        self.measured: Statistics | None = None

    def measure(self, size: tuple[int, int]) -> Statistics:
        """The reference, at `size` (height, width); measured or read the first time."""
        if self.measured is None:
            split = "test" if is_statistics(self.reference) or has_test_split(self.reference) else "train"
            self.measured = open_reference(
                self.reference, self.extractor, Wanted(), split=split, size=size, batch=self.batch
            )
        return self.measured

    def __call__(self, model: Pipeline) -> Report:
        """The report on what `model` draws with its own sampling settings. BrokenLatents where that is no picture."""
        reference = self.measure(model.image_size)
        plan = Plan.total(self.count, list(range(model.model.config.classes)) or [-1])
        pictures = DrawnPictures(model, plan, name="the run's model")
        found = collect(pictures, self.extractor, batch=self.batch)
        return compare(found, reference, self.extractor, Wanted())


def has_test_split(data: str) -> bool:
    """Whether `data` (see `open_source`) has pictures of its own for testing."""
    try:
        open_source(data, "test")
    except ValueError:
        return False
    return True
