"""What is made of texts: labels, probabilities and scores, from the answers to a few hundred of them at a time."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from numbers import Real
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textmeta.data.labels import (
    Label,
    checked_labels,
    checked_texts,
    checked_weights,
    column,
    label_array,
    whole_number,
)
from textmeta.encoder.encoder import warning_of
from textmeta.errors import AdapterError, DataError
from textmeta.meta.learner import Answers
from textmeta.progress import progress_bar
from textmeta.sharing.locate import DEFAULT_ADAPTER

Top = list[tuple[Any, float]]  # labels with their probabilities, the most probable first


class PredictsTexts:
    """Predicts, by the answers that another class gives."""

    batch_size: int
    errors: str
    progress: bool

    def _answerer(self) -> tuple[Any, Callable[[list[str]], Answers]]:
        """Return what has the ``classes``, and what answers n texts as one task."""
        raise NotImplementedError

    def predict_proba(self, texts: Iterable[str]) -> np.ndarray:
        """Return (n, classes) float64, the probability of each class, columns in the order of ``classes_``.

        A text's probabilities do not depend on the texts that it is sent with, but for rounding: in the last digits of
        float32, or some thousandths in bfloat16.
        """
        return np.asarray(self._answer(texts, "logits")[1].softmax(-1))

    def predict_log_proba(self, texts: Iterable[str]) -> np.ndarray:
        """Return (n, classes) float64, the logarithm of each class's probability."""
        return np.asarray(self._answer(texts, "logits")[1].log_softmax(-1))

    def decision_function(self, texts: Iterable[str]) -> np.ndarray:
        """Return (n, classes) float64 scores, of which the probabilities are the softmax.

        Of two classes (n,), how far the second is above the first, as scikit-learn has it.
        """
        logits = np.asarray(self._answer(texts, "logits")[1])
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_top(self, texts: Iterable[str], k: int = 3) -> list[Top]:
        """Return of each text its k most probable labels with their probabilities, the most probable first."""
        k = whole_number("predict_top: k", k, 1)
        return _tops(k, *self._answer(texts, "logits"))

    def predict_stream(self, texts: Iterable[str], k: int = 1, *, total: int | None = None) -> Iterator[Top]:
        """Yield what :meth:`predict_top` returns of each text, in order and as asked for: of any number of texts.

        ``batch_size`` texts are read ahead. All answers are of the task that is fitted at the call. A text that is cut,
        or hardly known, is warned of once, with the first batch that has one. DataError, naming the row of the stream,
        before an answer of its batch, if a text is no string.

        Args:
            texts: also a generator, without end even.
            k: how many labels of each.
            total: how many texts there are, for the bar, where ``len`` does not say it.
        """
        k = whole_number("predict_stream: k", k, 1)
        given = [texts] if isinstance(texts, str) else texts
        rows = column(given, "predict_stream", "texts")
        total = length_hint(given) if total is None else whole_number("predict_stream: total", total, 0)
        return self._stream(rows, k, total, self._answerer())

    def predict(self, texts: Iterable[str], *, reject: float | bool = False, outside: Any = None) -> np.ndarray:
        """Return (n,) the most probable label of each text, as given to ``fit``; a string alone is one text.

        Args:
            texts: n of them.
            reject: whether to reject texts that seem to belong to none of the classes: those whose :meth:`scope_score`
                is below this number; True is 0.5.
            outside: what is returned for these.

        Raises:
            AdapterError: if the adapter has learned no rule to reject by.
            DataError: if a text is no string, or ``reject`` no number from 0 to 1.
        """
        least: Any = reject.item() if getattr(reject, "ndim", None) == 0 else reject  # type: ignore[union-attr]
        if not isinstance(least, Real) or not 0 <= least <= 1:  # type: ignore[operator]
            raise DataError(f"predict: reject must be True, False or a number from 0 to 1, given {reject!r:.60}")
        fitted, logits, *scope = self._answer(texts, "logits", *["scope"] * (least is not False))
        predicted: np.ndarray = label_array(fitted.classes)[logits.argmax(-1).numpy()]
        if least is False:
            return predicted
        rejected = scope[0].numpy() < (0.5 if least is True else least)
        pairs = zip(predicted.tolist(), rejected.tolist(), strict=True)
        return label_array([outside if is_out else label for label, is_out in pairs])

    def scope_score(self, texts: Iterable[str]) -> np.ndarray:
        """Return (n,) float64, the probability that a text belongs to any of the classes.

        The rule was learned over tasks of which some classes had been left out, and is right where as many texts belong
        to none of the classes as to one; where fewer do, lower the threshold. AdapterError if there is no such rule.
        """
        return np.asarray(self._answer(texts, "scope")[1])

    def score(
        self, texts: Iterable[str], labels: Iterable[Label], sample_weight: Iterable[float] | None = None
    ) -> float:
        """Return the share of texts whose label is predicted right, each counting 1 or its weight."""
        rows, predicted = checked_labels(labels), self.predict(texts)
        if len(predicted) != len(rows) or not rows:
            raise DataError(f"score: {len(predicted)} texts but {len(rows)} labels, expected as many, and at least 1")
        weights = None if sample_weight is None else checked_weights(sample_weight, len(rows))
        right = [given == true for given, true in zip(predicted, rows, strict=True)]
        return float(np.average(right, weights=weights))

    def _stream(self, rows: Iterator[str], k: int, total: int, by: Any) -> Iterator[Top]:
        start, told = 0, set[str]()
        with progress_bar(total or None, "predict" if self.progress else None, " texts", brief=True) as bar:
            while batch := list(islice(rows, self.batch_size)):
                tops = _tops(k, *self._answer(batch, "logits", by=by, start=start, told=told))
                start += len(batch)
                bar.update(len(batch))
                yield from tops

    def _answer(
        self, texts: Iterable[str], *wanted: str, by: Any = None, start: int = 0, told: set[str] | None = None
    ) -> Any:
        """Return what has the classes, and what is wanted of :class:`Answers` to n texts: (n, …) float64 on the CPU.

        Of a batch of a stream, ``by`` is what answers, ``start`` its first row, and ``told`` which warnings there were.
        """
        fitted, answer = by or self._answerer()
        given = [texts] if isinstance(texts, str) else texts
        texts = checked_texts(given, "predict", allow_empty=True, errors=self.errors, start=start)
        parts = []
        starts = range(0, max(1, len(texts)), self.batch_size)
        label = "predict" if self.progress else None
        with torch.inference_mode(), warning_of(texts, "predict", start, told):
            several = len(starts) > 1
            for first in progress_bar(len(starts), label, " batches", over=starts, brief=True) if several else starts:
                answers = answer(texts[first : first + self.batch_size])
                found = [getattr(answers, name) for name in wanted]
                if any(value is None for value in found):
                    raise AdapterError(f"this adapter has no rule for what is out of scope, as {DEFAULT_ADAPTER} has")
                parts.append([value[0].cpu().double() for value in found])
        return fitted, *(torch.cat(part) for part in zip(*parts, strict=True))


def _tops(k: int, fitted: Any, logits: Tensor) -> list[Top]:
    top = logits.softmax(-1).sort(descending=True, stable=True)
    rows = zip(top.indices[:, :k].tolist(), top.values[:, :k].tolist(), strict=True)
    return [[(fitted.classes[n], p) for n, p in zip(*row, strict=True)] for row in rows]
