"""The classifier that users hold: fit on a handful of labelled texts, predict."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textmeta.artifact.store import Adapter, FittedHead, load_adapter, save_adapter
from textmeta.data.texts import checked_texts
from textmeta.errors import AdapterError, DataError, NotFittedError
from textmeta.meta.adaptation import adapt, task_weights
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import task_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS, class_mask
from textmeta.model.initialisation import head_scalars

__all__ = ["FewShotClassifier"]

CHUNK = 512  # texts of one pass of predict


class FewShotClassifier:
    """Classifies texts after a few gradient steps on a few labelled examples.

    Made by :meth:`from_pretrained`, or directly from the result of meta-training.

    Args:
        encoder: makes features.
        parameters: the meta-learned initialisation.
        inner: the inner loop that it was learned for.
        record: how it was trained; goes into what :meth:`save_pretrained` writes.

    Attributes:
        classes_: after ``fit``, the labels, sorted where they can be; columns of ``predict_proba`` are in this order.
    """

    def __init__(
        self,
        encoder: Encoder,
        parameters: Mapping[str, Tensor],
        inner: InnerLoopSettings,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self._encoder = encoder
        self._parameters = {name: value.detach().to(encoder.device) for name, value in parameters.items()}
        self._inner = inner
        self._record = dict(record or {})
        # after fit: LoRA factors (out, in) by name, and the head (C, d)
        self._factors: dict[str, Tensor] = {}
        self._weights: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", encoder: str | None = None
    ) -> "FewShotClassifier":
        """Load a meta-trained adapter, or a fitted classifier, from a folder.

        Args:
            folder: that ``save_pretrained`` or a training recipe wrote.
            device: where the encoder runs.
            encoder: folder or Hub id to load the encoder from, if not from where the adapter says.

        Raises:
            AdapterError: if the folder is missing or damaged, or does not belong to the encoder.
        """
        adapter: Adapter = load_adapter(folder)
        classifier = cls(adapter.load_encoder(device, encoder), adapter.parameters, adapter.inner, adapter.record)
        if adapter.fitted is not None:
            classifier._factors = {name: value.to(device) for name, value in adapter.fitted.factors.items()}
            classifier._weights = adapter.fitted.weights.to(device)
            classifier.classes_ = _label_array([_label_from_json(label) for label in adapter.fitted.classes])
        return classifier

    def fit(self, texts: Sequence[str], labels: Iterable[Hashable]) -> "FewShotClassifier":
        """Adapt to a task: at least two classes, with one text each or more.

        Args:
            texts: the support examples.
            labels: label of each, of any hashable type.

        Returns:
            The classifier itself.

        Raises:
            DataError: naming the row, if a text is no string or empty, a label is missing or not hashable, or there
                are fewer than two classes.
        """
        texts = checked_texts(texts, "fit")
        rows = _checked_labels(labels)
        if len(texts) != len(rows):
            raise DataError(f"fit: {len(texts)} texts but {len(rows)} labels")
        classes = _sorted_if_possible(dict.fromkeys(rows))
        if len(classes) < 2:
            raise DataError(f"fit needs examples of at least 2 classes, found {len(classes)}: {classes}")
        index = {label: i for i, label in enumerate(classes)}
        for row, label in enumerate(rows):
            if type(classes[index[label]]) is not type(label):
                raise DataError(
                    f"fit, row {row}: label {label!r} equals {classes[index[label]]!r} but is of another type; a class "
                    "needs one label"
                )
        support = task_batch(self._encoder, [texts], [[index[label] for label in rows]], [len(classes)])
        with torch.no_grad():
            adapted = adapt(self._encoder, self._parameters, support, self._inner)
            self._weights = task_weights(self._encoder, adapted, support)[0]
        self._factors = {name: value[0] if value.ndim == 3 else value for name, value in adapted.factors.items()}
        self.classes_ = _label_array(classes)
        return self

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, classes) float64, the probability of each class, columns in the order of ``classes_``.

        A text's probabilities do not depend on the texts that it is sent with, but for rounding in the last digits.

        Raises:
            NotFittedError: before ``fit``.
            DataError: if a text is no string.
        """
        if self._weights is None:
            raise NotFittedError("this classifier has not been fitted: call fit(texts, labels) first")
        texts = checked_texts(texts, "predict", allow_empty=True)
        head, scalars = HEADS[self._inner.head], head_scalars(self._parameters)
        mask = class_mask(torch.tensor([len(self._weights)], device=self._encoder.device))
        parts = [np.empty((0, len(self._weights)))]
        with torch.no_grad():
            for start in range(0, len(texts), CHUNK):
                prepared = self._encoder.prepare(texts[start : start + CHUNK], remember=False)
                features = self._encoder.features(prepared, self._factors)
                logits = head.logits(features[None], self._weights[None], scalars, mask)
                parts.append(logits[0].double().softmax(-1).cpu().numpy())
        return np.concatenate(parts)

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n,) the most probable label of each text, as given to ``fit``."""
        best = self.predict_proba(texts).argmax(1)
        predicted: np.ndarray = self.classes_[best]
        return predicted

    def score(self, texts: Sequence[str], labels: Iterable[Hashable]) -> float:
        """Return the share of texts whose label is predicted right."""
        rows = _checked_labels(labels)
        predicted = self.predict(texts)
        if len(predicted) != len(rows) or not rows:
            raise DataError(f"score: {len(predicted)} texts but {len(rows)} labels, expected as many, and at least 1")
        return float(np.mean([given == true for given, true in zip(predicted, rows, strict=True)]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter, and the fitted task if there is one, to a folder; the texts of ``fit`` are not stored.

        Raises:
            AdapterError: if a label is no string, number, truth value, or tuple of these.
        """
        fitted = None
        if self._weights is not None:
            classes = [_label_to_json(label) for label in self.classes_.tolist()]
            fitted = FittedHead(self._factors, self._weights, classes)
        save_adapter(folder, self._encoder, self._parameters, self._inner, self._record, fitted)


def _checked_labels(labels: Iterable[Hashable]) -> list[Any]:
    if isinstance(labels, str):
        raise DataError("expected a list of labels, given one string; put it into a list")
    # scalars of NumPy and PyTorch, the latter hashed by identity, become Python's own
    checked = [label.item() if isinstance(label, np.generic | Tensor) else label for label in labels]
    for row, label in enumerate(checked):
        try:
            hash(label)
        except TypeError as error:
            raise DataError(f"row {row}: label {label!r:.60} of type {type(label).__name__} is not hashable") from error
        if _is_missing(label):
            raise DataError(f"row {row}: the label is missing ({label})")
    return checked


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except TypeError:
        return True  # pandas' NA, which has no truth value


def _sorted_if_possible(labels: Iterable[Any]) -> list[Any]:
    labels = list(labels)
    try:
        return sorted(labels)
    except TypeError:
        return labels


def _label_array(labels: list[Any]) -> np.ndarray:
    """Return labels as an array that gives each back as it is: NumPy's own type only where all have the same."""
    if len({type(label) for label in labels}) == 1 and isinstance(labels[0], str | bool | int | float):
        array = np.array(labels)
        # NumPy makes floats of very large integers, and drops null characters from the end of strings
        if [(type(label), label) for label in array.tolist()] == [(type(label), label) for label in labels]:
            return array
    array = np.empty(len(labels), dtype=object)
    for row, label in enumerate(labels):
        array[row] = label
    return array


def _label_to_json(label: Any) -> Any:
    if isinstance(label, tuple):
        return {"tuple": [_label_to_json(part) for part in label]}
    if type(label) in (str, int, float, bool):
        return label
    raise AdapterError(
        f"cannot save a classifier whose label {label!r:.60} is a {type(label).__name__}; labels that can be saved are "
        "strings, numbers, truth values, and tuples of these"
    )


def _label_from_json(label: Any) -> Any:
    if isinstance(label, dict) and isinstance(label.get("tuple"), list):
        return tuple(_label_from_json(part) for part in label["tuple"])
    if type(label) in (str, int, float, bool):
        return label
    raise AdapterError(f"classifier.json: unexpected label {label!r:.60}")
