"""Many classifiers on the same texts: what they share is read once."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from textmeta.classifier import FewShotClassifier
from textmeta.data.labels import checked_texts, label_array
from textmeta.encoder.encoder import warning_of
from textmeta.encoder.token_states import TokenStateReader, TokenStates
from textmeta.errors import DataError
from textmeta.meta.learner import TaskLearner

__all__ = ["predict_many"]


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
    readers: dict[tuple[int, int], _ReadOnce] = {}
    held = []
    for one in given:
        fitted, learner = one._task()
        key = id(learner.reader), id(learner.adapter.initialisation)
        reader = readers.setdefault(key, _ReadOnce(learner.reader))  # type: ignore[arg-type] # no cache
        held.append((fitted, TaskLearner(reader, learner.adapter)))
    size = min((one.batch_size for one in given), default=1)
    found: list[list[np.ndarray]] = [[] for _ in held]
    with warning_of(rows, "predict_many"):
        for start in range(0, max(1, len(rows)), size):
            for parts, one, by in zip(found, given, held, strict=True):
                fitted, logits = one._answer(rows[start : start + size], "logits", by=by)
                parts.append(label_array(fitted.classes)[logits.argmax(-1).numpy()])
            for reader in readers.values():
                reader.known.clear()
    return [np.concatenate(parts) for parts in found]


class _ReadOnce(TokenStateReader):
    """A reader that keeps what it has read without LoRA factors of a task, for others who ask for the same texts."""

    def __init__(self, reader: TokenStateReader) -> None:
        vars(self).update(vars(reader))
        self.known: dict[tuple[str, ...], TokenStates] = {}

    def read(
        self, texts: Sequence[str], factors: Mapping[str, Tensor] | None = None, row_task: Tensor | None = None
    ) -> TokenStates:
        """Return the token states of texts, those of a task's own factors read anew."""
        if row_task is not None:
            return super().read(texts, factors, row_task)
        key = tuple(texts)
        if key not in self.known:
            self.known[key] = super().read(texts, factors)
        return self.known[key]
