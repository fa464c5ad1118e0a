"""Is a picture of the class that was asked for? Classes of pictures and of a judge are matched by name."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from mar.evaluation.features import Extractor, Features
from mar.evaluation.statistics import sum_over_ranks
from mar.evaluation.streams import Pictures, PictureSet


class Agreement:
    """Counts, class by class, the pictures that the judge takes for what they are to be.

    `classifier` is the judge; by default the extractor, where its classes are the pictures'. Classes that the judge
    does not know are left out. Raises ValueError where a classifier shares no class with the pictures.
    """

    def __init__(self, pictures: PictureSet, extractor: Extractor, classifier: Extractor | None) -> None:
        judge = classifier or extractor
        self._classifier = classifier
        self._table = class_numbers(pictures.classes, judge.classes)
        if classifier is not None and self._table is None:
            raise ValueError(
                f"{classifier.name} knows {_few(classifier.classes)}, but {pictures.name} has {_few(pictures.classes)}:"
                " it can't say whether they agree"
            )
        self._right = torch.zeros(len(pictures.classes), dtype=torch.int64)
        self._asked = torch.zeros_like(self._right)

    def add(self, part: Pictures, found: Features) -> None:
        """Adds a batch, of which the extractor has `found` this."""
        if self._table is None:
            return
        logits = found.logits if self._classifier is None else self._classifier(part.images).logits
        assert logits is not None  # who has classes has logits
        known = torch.isin(part.labels, self._table) & (part.labels >= 0)
        hits = (self._table[logits.argmax(1).cpu()] == part.labels)[known]
        self._asked.index_add_(0, part.labels[known], torch.ones_like(part.labels[known]))
        self._right.index_add_(0, part.labels[known], hits.long())

    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For each class how many pictures were right, and how many judged, over all processes; () without a judge."""
        if self._table is None:
            return (), ()
        return tuple(sum_over_ranks(self._right).tolist()), tuple(sum_over_ranks(self._asked).tolist())


def class_numbers(theirs: tuple[str, ...], judges: tuple[str, ...]) -> Int[Tensor, " k"] | None:
    """For each class of the judge its number among `theirs`, -1 where there is none; None where no name is shared."""
    numbers = {name.casefold(): i for i, name in enumerate(theirs)}
    table = torch.tensor([numbers.get(name.casefold(), -1) for name in judges], dtype=torch.int64)
    return table if bool((table >= 0).any()) else None


def _few(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"the classes {shown}" if names else "no class names"
