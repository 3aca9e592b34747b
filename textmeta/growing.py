"""An estimator that learns its task anew when examples or classes come or go."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from textmeta.data.labels import (
    Label,
    checked_class_weight,
    checked_labels,
    checked_texts,
    checked_weights,
    column,
    few,
    is_word,
    readable_name,
    relative_weights,
)
from textmeta.encoder.encoder import warning_of
from textmeta.errors import AdapterError, DataError
from textmeta.estimator import AdapterEstimator
from textmeta.meta.batch import TaskBatch
from textmeta.meta.learner import TaskLearner
from textmeta.sharing.store import Fitted
from textmeta.sharing.support import Example, FitInputs

__all__ = ["GrowingEstimator"]

NOT_FINITE = "the adapter makes numbers of this task that are not finite; it is not usable"


class GrowingEstimator(AdapterEstimator):
    """Learns tasks, and each anew from all that it was given when that changes."""

    def partial_fit(
        self,
        texts: Iterable[str],
        labels: Iterable[Label],
        classes: Iterable[Label] | None = None,
        *,
        sample_weight: Iterable[float] | None = None,
    ) -> Self:
        """Learn anew from these examples and all earlier ones, as one ``fit`` of all would; the first call fits.

        Args:
            texts: further examples, of classes that are there or of new ones.
            labels: of each.
            classes: all labels that may come, as scikit-learn has it. If they are words, all are classes from the first
                call on, by their names; else each is when it has an example.
            sample_weight: as in ``fit``.

        Raises:
            DataError: as in ``fit``, or if a label is none of ``classes``.
            AdapterError: if the classifier was saved without its examples; see :meth:`save_pretrained`.
        """
        given = self._examples("partial_fit", texts, labels, sample_weight)
        known = [] if classes is None else checked_labels(classes, "partial_fit, classes, row")
        other = [] if classes is None else [label for _, label, _ in given if label not in known]
        if other:
            raise DataError(f"partial_fit: {few(other)} is none of classes, {few(known)}")
        names = {label: readable_name(label) for label in known} if all(map(is_word, known)) else {}
        with self._lock:
            before = self._inputs() if self.__sklearn_is_fitted__() else FitInputs(names=names)
            return self._learn("partial_fit", before.joined(given), [text for text, *_ in given])

    def add_class(self, label: Label, examples: Iterable[str] = (), *, name: str | None = None) -> Self:
        """Learn anew with one more class, from examples, a name, or both.

        Args:
            label: of the class.
            examples: of it.
            name: what it is called; by default the label, where labels are read.

        Raises:
            DataError: if it is a class already, has neither examples nor a name, or lacks a name that the others have.
            AdapterError: as in :meth:`partial_fit`.
        """
        self._now()
        [label] = checked_labels([label], "add_class, label")
        texts = list(column(examples, "add_class", "texts"))
        given = self._examples("add_class", texts, [label] * len(texts))
        with self._lock:
            before = self._inputs()
            if label in self._now().classes:
                raise DataError(f"add_class: {label!r:.60} is a class already; partial_fit takes further examples")
            if name is None and not texts:
                if not before.reads_labels or not is_word(label):
                    raise DataError(f"add_class: the class {label!r:.60} needs examples or a name")
                name = readable_name(str(label))
            if name is not None:
                before = replace(before, names={**(before.names or {}), label: name})
            return self._learn("add_class", before.joined(given), texts)

    def remove_class(self, label: Label) -> Self:
        """Learn anew without a class and its examples.

        Raises:
            DataError: if there is no such class, or fewer than two would be left.
            AdapterError: as in :meth:`partial_fit`.
        """
        with self._lock:
            before, [label] = self._inputs(), checked_labels([label], "remove_class, label")
            if label not in self._now().classes:
                raise DataError(f"remove_class: expected one of {few(self._now().classes)}, given {label!r:.60}")
            kept = tuple(example for example in before.examples if example[1] != label)
            names = before.names and {own: name for own, name in before.names.items() if own != label}
            return self._learn("remove_class", replace(before, examples=kept, names=names), [])

    def _examples(self, where: str, texts: Any, labels: Any, sample_weight: Any = None) -> tuple[Example, ...]:
        """Return examples, checked, without those that count 0."""
        given, rows = checked_texts(texts, where, errors=self.errors), checked_labels(labels)
        if len(given) != len(rows):
            raise DataError(f"{where}: {len(given)} texts but {len(rows)} labels")
        weights = [1.0] * len(given) if sample_weight is None else checked_weights(sample_weight, len(given))
        return tuple(example for example in zip(given, rows, weights, strict=True) if example[2])

    def _inputs(self) -> FitInputs:
        """Return what the classifier was fitted on."""
        inputs = self._task()[0].inputs
        if inputs is None:
            raise AdapterError(
                "this classifier was saved without its examples, so that it can be fitted, but not grow: save it with "
                'include_support="texts", or "states", which are token states instead of texts'
            )
        return inputs

    def _learn(self, where: str, inputs: FitInputs, new: Sequence[str], by: TaskLearner | None = None) -> Self:
        """Learn the task, of whose texts some are new, by its own learner or another; return the classifier."""
        classes, names = inputs.classes(where)
        number = {label: i for i, label in enumerate(classes)}
        by_class = checked_class_weight(self.class_weight, classes)
        if where != "fit" and names is None and self.__sklearn_is_fitted__() and self._now().task.name_scale.any():
            code = next(label for label in classes if not is_word(label))
            told = f"{where}: {code!r:.60} is no word, so that no label is read as a name from now on"
            warnings.warn(f"{told}; add_class takes a name for it", stacklevel=3)
        arguments, learner = self._arguments, inputs.read_by(by or self._learner)
        device = learner.adapter.initialisation.queries.device
        texts, numbers = [text for text, *_ in inputs.examples], [number[label] for _, label, _ in inputs.examples]
        relative = relative_weights([weight for *_, weight in inputs.examples], where)
        shares = [part if part is None else [part] for part in (relative, by_class)]
        try:
            # the inner steps take gradients
            with self._lock, torch.inference_mode(False), torch.no_grad(), warning_of(new, where):
                batch = TaskBatch.of([texts], [numbers], [len(classes)], [names], [inputs.unlabelled], device, *shares)
                task = learner.learn(batch).to(torch.device("cpu"))  # any device takes it from there
                if not all(value.isfinite().all() for value in vars(task).values() if isinstance(value, Tensor)):
                    raise AdapterError(NOT_FINITE)
                weights = learner.adapter.weights_sha256
                self._fitted = Fitted(task, classes, inputs, weights_sha256=weights, arguments=arguments)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise AdapterError(NOT_FINITE) from error
        return self
