"""Is a picture of the class that was asked for? Classes of pictures and of a judge are matched by name."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from mar.evaluation.features import Extractor, Features
from mar.evaluation.image_sets import ImageBatch, PictureSet
from mar.evaluation.statistics import sum_over_ranks
from mar.sampling.sinks.folder import class_folders


class ClassAccuracy:
    """Counts, class by class, the pictures that the judge takes for what they are to be.

    `classifier` is the judge; by default the extractor, where its classes are the pictures'. Classes that the judge
    does not know are left out. Raises ValueError where a classifier shares no class with the pictures.
    """

    def __init__(self, pictures: PictureSet, extractor: Extractor, classifier: Extractor | None) -> None:
        judge = classifier or extractor
        self._classifier, self._classes = classifier, pictures.classes
        self._table = class_numbers(pictures.classes, judge.classes)
        if classifier is not None and self._table is None:
            raise ValueError(
                f"{classifier.name} knows {_few(classifier.classes)}, but {pictures.name} has {_few(pictures.classes)}:"
                " it can't say whether they agree"
            )
        self._right = torch.zeros(len(pictures.classes), dtype=torch.int64)
        self._asked = torch.zeros_like(self._right)

    def add(self, part: ImageBatch, found: Features) -> None:
        """Adds a batch, of which the extractor has `found` this."""
        if self._table is None:
            return
        logits = found.logits if self._classifier is None else self._classifier(part.images).logits
        assert logits is not None  # who has classes has logits
        known = torch.isin(part.labels, self._table) & (part.labels >= 0)
        hits = (self._table[logits.argmax(1).cpu()] == part.labels)[known]
        self._asked.index_add_(0, part.labels[known], torch.ones_like(part.labels[known]))
        self._right.index_add_(0, part.labels[known], hits.long())

    def left_out(self) -> tuple[str, ...]:
        """The names of the classes that the judge does not know; () without a judge."""
        if self._table is None:
            return ()
        known = set(self._table.tolist())
        return tuple(name for i, name in enumerate(self._classes) if i not in known)

    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """For each class how many pictures were right, and how many judged, over all processes; () without a judge."""
        if self._table is None:
            return (), ()
        return tuple(sum_over_ranks(self._right).tolist()), tuple(sum_over_ranks(self._asked).tolist())


def class_numbers(theirs: tuple[str, ...], judges: tuple[str, ...]) -> Int[Tensor, " k"] | None:
    """For each class of the judge its number among `theirs`, -1 where there is none; None where no name is shared.

    Classes are the same where their names are, in any case, or those of the folders that `mar generate` makes for them:
    pictures that it wrote know only these.
    """
    names = {name.casefold(): i for i, name in enumerate(theirs)}
    numbers = names | {folder: i for i, folder in enumerate(_folders(theirs))}
    found = [
        numbers.get(folder, numbers.get(name.casefold(), -1))
        for folder, name in zip(_folders(judges), judges, strict=True)
    ]
    table = torch.tensor(found, dtype=torch.int64)
    return table if bool((table >= 0).any()) else None


def _folders(names: tuple[str, ...]) -> list[str]:
    folders = class_folders(names)
    return [folders[i].casefold() for i in range(len(names))]


def _few(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"the classes {shown}" if names else "no class names"
