"""Many classifiers on the same texts: what they share is read once."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from textmeta.classifier import FewShotClassifier
from textmeta.data.labels import checked_texts, label_array
from textmeta.encoder.encoder import warning_of
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import DataError
from textmeta.meta.learner import LearnedTask
from textmeta.sharing.store import Fitted

Stack = tuple[Sequence[weakref.ref[Fitted]], LearnedTask]
_STACKED: weakref.WeakKeyDictionary[TokenStateReader, Stack] = weakref.WeakKeyDictionary()
MOST_TEXTS = 8192  # at once, times tasks: memory stays bounded


def predict_many(classifiers: Iterable[FewShotClassifier], texts: Iterable[str]) -> list[np.ndarray]:
    """Return what the ``predict`` of each classifier returns, with each text read once by all that share an encoder.

    They share it if they have the same adapter, encoder, ``max_length``, device and precision; where LoRA itself is
    adapted to the task (``adapt="lora"``), a classifier reads by itself. NotFittedError if one has not been fitted,
    DataError if one is no FewShotClassifier, or a text is no string.
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
    chosen: list[list[np.ndarray]] = [[] for _ in held]
    with warning_of(rows, "predict_many"), torch.inference_mode():
        for numbers in groups.values():
            learner = held[numbers[0]][1]
            task = _stacked([held[number][0] for number in numbers], learner.reader)
            task = task.to(learner.adapter.initialisation.queries.device)
            for start in range(0, max(1, len(rows)), size):
                logits = learner.answer_all(task, rows[start : start + size]).logits
                for number, best in zip(numbers, logits.argmax(-1).cpu().numpy(), strict=True):
                    chosen[number].append(best)
    return [label_array(fitted.classes)[np.concatenate(parts)] for (fitted, _), parts in zip(held, chosen, strict=True)]


def _stacked(tasks: list[Fitted], reader: TokenStateReader) -> LearnedTask:
    """Return T tasks as one object, padded to the most classes; those that a reader was last asked for are kept."""
    if len(tasks) == 1:
        return tasks[0].task  # which may have factors of its own
    refs, kept = _STACKED.get(reader, ((), None))
    if kept and [ref() for ref in refs] == tasks:
        return kept
    made: dict[str, Tensor] = {}
    for name in vars(tasks[0].task).keys() - {"factors"}:
        given = [getattr(fitted.task, name) for fitted in tasks]
        if name == "queries":
            given = [part.expand(1, *part.shape[-2:]) for part in given]
        by_class = name in ("weights", "class_means")  # whose last axis are the classes; else the first, or none
        rows = [part[0].movedim(-1, 0) if by_class else part[0] for part in given]
        padded = pad_sequence(rows, batch_first=True) if rows[0].ndim else torch.stack(rows)
        made[name] = padded.movedim(1, -1) if by_class else padded
    kept = LearnedTask(**made, factors={})
    _STACKED[reader] = [weakref.ref(fitted) for fitted in tasks], kept
    return kept
