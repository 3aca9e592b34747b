"""Many classifiers on the same texts: what they share is read once."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from textmeta.classifier import FewShotClassifier
from textmeta.data.labels import checked_texts, label_array
from textmeta.encoder.encoder import warning_of
from textmeta.errors import DataError
from textmeta.meta.learner import LearnedTask

__all__ = ["predict_many"]

MOST_TEXTS = 16384  # at once, times tasks: memory stays bounded


def predict_many(classifiers: Iterable[FewShotClassifier], texts: Iterable[str]) -> list[np.ndarray]:
    """Return what the ``predict`` of each classifier returns, with each text read once by all that share an encoder.

    They share it if they have the same adapter, encoder, ``max_length``, device and precision. Where LoRA itself is
    adapted to the task (``adapt="lora"``), a classifier reads by itself.

    Args:
        classifiers: fitted.
        texts: as for ``predict``.

    Raises:
        NotFittedError: if a classifier has not been fitted.
        DataError: if one is no FewShotClassifier, or a text is no string.
    """
    if not isinstance(classifiers, Iterable):
        raise DataError(f"predict_many: expected a list of classifiers, given {type(classifiers).__name__}")
    given = list(classifiers)
    for number, one in enumerate(given):
        if not isinstance(one, FewShotClassifier):
            raise DataError(f"predict_many: classifier {number} is {type(one).__name__}, expected a FewShotClassifier")
    errors = "raise" if any(one.errors == "raise" for one in given) else "replace"
    rows = checked_texts([texts] if isinstance(texts, str) else texts, "predict_many", allow_empty=True, errors=errors)
    held = [one._task() for one in given]
    groups = defaultdict(list)
    for number, (fitted, learner) in enumerate(held):
        own = number if fitted.task.factors else None
        groups[id(learner.reader), id(learner.adapter.initialisation), own].append(number)
    size = max(1, min([MOST_TEXTS // max(1, len(held)), *(one.batch_size for one in given)]))
    chosen: list[list[Tensor]] = [[] for _ in held]
    with warning_of(rows, "predict_many"), torch.inference_mode():
        for numbers in groups.values():
            learner = held[numbers[0]][1]
            task = _stacked([held[number][0].task for number in numbers])
            task = task.to(learner.adapter.initialisation.queries.device)
            for start in range(0, max(1, len(rows)), size):
                logits = learner.answer_all(task, rows[start : start + size]).logits
                for number, labels in zip(numbers, logits.argmax(-1).cpu(), strict=True):
                    chosen[number].append(labels)
    return [
        label_array(fitted.classes)[torch.cat(parts).numpy()] for (fitted, _), parts in zip(held, chosen, strict=True)
    ]


def _stacked(tasks: Sequence[LearnedTask]) -> LearnedTask:
    """Return T tasks as one object, padded to the most classes; none but one alone may have factors of its own."""
    made: dict[str, Tensor] = {}
    for name in vars(tasks[0]).keys() - {"factors"}:
        parts = [getattr(task, name) for task in tasks]
        parts = [part[None] if name == "queries" and part.ndim == 2 else part for part in parts]
        sizes = [max(axis) for axis in zip(*(part.shape[1:] for part in parts), strict=True)]
        for number, part in enumerate(parts):
            if list(part.shape[1:]) != sizes:
                more = zip(reversed(sizes), reversed(part.shape[1:]), strict=True)
                parts[number] = pad(part, [n for size, own in more for n in (0, size - own)])
        made[name] = torch.cat(parts)
    return LearnedTask(**made, factors=tasks[0].factors)
