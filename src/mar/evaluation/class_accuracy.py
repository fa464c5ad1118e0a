"""Class accuracy: the share of images that a classifier takes for the class they were drawn with.

Classes of the images and of the classifier are matched by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mar import distributed
from mar.evaluation.features import Extractor, Features
from mar.evaluation.image_sets import ImageBatch, ImageSet
from mar.sampling.sinks.folder import class_folders


class ClassAccuracy:
    """Running counts of correct and of all classified images, class by class.

    `classifier` is by default the extractor itself, if it knows classes of the images; without either nothing is
    counted. Classes that it does not know are left out. Raises ValueError for a classifier without a shared class.
    """

    def __init__(self, images: ImageSet, extractor: Extractor, classifier: Extractor | None) -> None:
        network = classifier or extractor
        self._classifier, self._classes = classifier, images.classes
        self._class_map = match_classes(images.classes, network.classes)
        if classifier is not None and self._class_map is None:
            raise ValueError(
                f"{classifier.name} knows {_class_list(classifier.classes)}, but {images.name} has "
                f"{_class_list(images.classes)}: expected a classifier with at least one of them"
            )
        self._correct = torch.zeros(len(images.classes), dtype=torch.int64)
        self._total = torch.zeros_like(self._correct)

    def add(self, batch: ImageBatch, features: Features) -> None:
        """Counts a batch; `features` are the extractor's."""
        if self._class_map is None:
            return
        logits = features.logits if self._classifier is None else self._classifier(batch.images).logits
        assert logits is not None  # a network with classes has logits
        known = torch.isin(batch.labels, self._class_map) & (batch.labels >= 0)
        correct = (self._class_map[logits.argmax(1).cpu()] == batch.labels)[known]
        self._total.index_add_(0, batch.labels[known], torch.ones_like(batch.labels[known]))
        self._correct.index_add_(0, batch.labels[known], correct.long())

    def unknown_classes(self) -> tuple[str, ...]:
        """Returns the names of the classes that the classifier does not know; () without a classifier."""
        if self._class_map is None:
            return ()
        known = set(self._class_map.tolist())
        return tuple(name for i, name in enumerate(self._classes) if i not in known)

    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns correct and all images of each class, over all ranks; () without a classifier."""
        if self._class_map is None:
            return (), ()
        correct, total = distributed.sum_over_ranks(self._correct), distributed.sum_over_ranks(self._total)
        return tuple(correct.tolist()), tuple(total.tolist())


def match_classes(images: Sequence[str], classifier: Sequence[str]) -> Int[Tensor, " k"] | None:
    """Returns the images' class number of each class of the classifier.

    It is -1 for a class that the images do not have; the whole result is None if no class is shared. Names match in
    any case, and also as the names of folders that `mar generate` makes of them.
    """
    names = {name.casefold(): i for i, name in enumerate(images)}
    numbers = names | {folder: i for i, folder in enumerate(_folder_names(images))}
    matches = [
        numbers.get(folder, numbers.get(name.casefold(), -1))
        for folder, name in zip(_folder_names(classifier), classifier, strict=True)
    ]
    class_map = torch.tensor(matches, dtype=torch.int64)
    return class_map if bool((class_map >= 0).any()) else None


def _folder_names(classes: Sequence[str]) -> list[str]:
    folders = class_folders(classes)
    return [folders[i].casefold() for i in range(len(classes))]


def _class_list(names: Sequence[str]) -> str:
    return f"the classes {shorten(names)}" if names else "no class names"


def shorten(names: Sequence[str]) -> str:
    """Lists the first five names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
