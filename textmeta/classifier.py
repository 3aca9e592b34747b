"""The classifier that users hold: fit on a handful of labelled texts, predict."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import wraps
from itertools import islice
from numbers import Real
from operator import length_hint
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from sklearn.base import ClassifierMixin, TransformerMixin
from torch import Tensor
from tqdm import tqdm

from textmeta.data.labels import (
    Label,
    LabelNames,
    checked_labels,
    checked_texts,
    checked_weights,
    column,
    label_array,
    task_classes,
    whole_number,
)
from textmeta.encoder.encoder import warning_of
from textmeta.errors import AdapterError, DataError
from textmeta.estimator import NotFittedError
from textmeta.growing import GrowingEstimator
from textmeta.heads.scope import scope_probability
from textmeta.meta.learner import TaskLearner
from textmeta.meta.left_out import LeftOut, SuspectLabel, left_out
from textmeta.meta.task_embedding import TaskEmbedding, task_embedding
from textmeta.nearest import KnownTask, nearest_tasks
from textmeta.sharing.locate import DEFAULT_ADAPTER
from textmeta.sharing.store import Fitted
from textmeta.sharing.support import FitInputs

__all__ = ["FewShotClassifier", "NotFittedError"]

BAR_AFTER = 5.0  # seconds
Held = tuple[Fitted, TaskLearner]  # the task, and what answers by it
Top = list[tuple[Any, float]]  # labels with their probabilities, the most probable first
_LEFT_OUT: WeakKeyDictionary[Fitted, LeftOut] = WeakKeyDictionary()  # goes with the task, and into no pickle


class FewShotClassifier(ClassifierMixin, TransformerMixin, GrowingEstimator):  # type: ignore[misc]
    """Classifies texts by a few labelled examples of each class, by names of the classes, or by both.

    ``FewShotClassifier()`` has the adapter that comes with textmeta. It is an estimator of scikit-learn: making one
    stores the arguments alone. Adapter and encoder are loaded when they are first needed, and kept. Before ``fit``,
    whatever is asked of the fitted task raises NotFittedError.

    Args:
        adapter: one in hand, such as :meth:`textmeta.MetaTrainer.train` returns; or the name of one: a folder, an
            adapter shipped in the package (``textmeta/minilm-general``), or a repository on the Hub, looked for in this
            order. A task that was saved with it is left out (:meth:`from_pretrained` loads it, too). None uses the
            encoder as it is, with general numbers of the default adapter.
        encoder: folder or Hub id to load the encoder from, if not from where the adapter says. Beside the default
            adapter it may be any encoder: one that is not the adapter's is used as with None.
        adapt: what the inner steps change: a part of what the adapter has learned to change ("pooling", "lora"), or
            "none"; None is all of it.
        steps: number of inner steps, from 0 to what the adapter has learned; None is all.
        class_weight: how much an example of each class counts in the head, as scikit-learn has it: "balanced", so that
            classes count alike, however many examples each has; None, all examples alike; or a mapping from labels to
            numbers, 1 where it says nothing. Where to look, and in which layers, is found with all classes alike.
        max_length: texts are cut after this many tokens; None is the adapter's own number.
        long_texts: "cut" reads no more of a longer text, and warns; "window" reads it all, in overlapping windows of
            this length, and averages what is made of them. It takes time and memory by the window. None is the
            adapter's own way, mostly "cut".
        batch_size: texts answered at once, which bounds the memory that their token states take.
        device: where the encoder runs; None is what there is: cuda, mps or cpu.
        precision: "bf16" runs the encoder's matrix products in bfloat16, "no" all in float32; "auto" is bf16 where that
            is faster: on GPUs that have it, and CPUs with AMX. What is fitted in one can be used in the other.
        errors: what half of a character in a text does: "raise" an error, or "replace" it.
        progress: whether a bar is shown where predicting takes long.
    """

    def fit(
        self,
        texts: Iterable[str] = (),
        labels: Iterable[Label] = (),
        *,
        sample_weight: Iterable[float] | None = None,
        label_names: LabelNames = "auto",
        unlabelled: Iterable[str] | None = None,
    ) -> Self:
        """Learn a task: at least two classes, each with an example or more, a name, or both; return the classifier.

        Args:
            texts: the labelled examples: a list, an array, a series, or a table's only column; so are all others.
            labels: label of each: a string, a number or a truth value.
            sample_weight: how much each example counts beside the others of its class, from 0; by default 1. One that
                counts 0 is left out.
            label_names: what the classes are called. "auto" reads the labels themselves, if all are words; a mapping
                from labels to names says it better, and may have classes without examples; a list has a name for each
                of ``classes_``; None reads nothing. Names weigh as much as the examples say that they are worth.
            unlabelled: further texts of the same source, without labels. They help at few examples.

        Raises:
            DataError: naming the place, if a text or a name is no string or empty, a label is missing, of another type
                or equal to one of another type, ``label_names`` is something else, or there are fewer than two classes.
            AdapterError: if the adapter cannot be loaded, or makes numbers of this task that are not finite.
        """
        given = checked_texts(texts, "fit", errors=self.errors)
        examples = self._examples("fit", given, labels, sample_weight)
        more = () if unlabelled is None else checked_texts(unlabelled, "unlabelled", errors=self.errors)
        classes, found = task_classes([label for _, label, _ in examples], label_names)
        reads_labels = isinstance(label_names, str)
        names = {} if reads_labels else None if found is None else dict(zip(classes, found, strict=True))
        return self._learn("fit", FitInputs(examples, tuple(more), names, reads_labels), [*given, *more])

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
        """Return (n, classes) float64 scores, of which the probabilities are the softmax; of two classes (n,).

        Of two classes it is how far the second is above the first, as scikit-learn has it.
        """
        logits = np.asarray(self._answer(texts, "logits")[1])
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_top(self, texts: Iterable[str], k: int = 3) -> list[Top]:
        """Return of each text its k most probable labels with their probabilities, the most probable first."""
        k = whole_number("predict_top: k", k, 1)
        return _tops(k, *self._answer(texts, "logits"))

    def predict_stream(self, texts: Iterable[str], k: int = 1, *, total: int | None = None) -> Iterator[Top]:
        """Yield what :meth:`predict_top` returns of each text, in order and as asked for: of any number of texts.

        ``batch_size`` texts are read ahead and in memory. All answers are of the task that is fitted at the call. A
        text that is cut, or hardly known, is warned of once, with the first batch that has one.

        Args:
            texts: also a generator, without end even.
            k: how many labels of each.
            total: how many texts there are, for the bar, where ``len`` does not say it.

        Raises:
            DataError: naming the row of the stream, before an answer of its batch, if a text is no string.
        """
        k = whole_number("predict_stream: k", k, 1)
        given = [texts] if isinstance(texts, str) else texts
        rows = column(given, "predict_stream", "texts")
        total = length_hint(given) if total is None else whole_number("predict_stream: total", total, 0)
        return self._stream(rows, k, total, self._task())

    def transform(self, texts: Iterable[str]) -> np.ndarray:
        """Return (n, features) float64: what the task's head sees of each text.

        They are its views, one an encoder layer, centred and each times the root of its weight.
        """
        fitted, views = self._answer(texts, "views")
        return np.asarray((views * fitted.task.mixture[0].cpu().double().sqrt()[:, None]).flatten(1))

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Return the names of what :meth:`transform` gives: layer and number."""
        views, size = self._now().task.queries.shape[-2:]
        layers = self._adapter.learner.layers or range(views)
        return np.array([f"layer{layer}_{number}" for layer in layers for number in range(size)], dtype=object)

    def predict(self, texts: Iterable[str], *, reject: float | bool = False, outside: Any = None) -> np.ndarray:
        """Return (n,) the most probable label of each text, as given to ``fit``.

        Args:
            texts: n of them; a string alone is one.
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
        fitted, logits, *scope_inputs = self._answer(texts, "logits", *["scope_inputs"] * (least is not False))
        predicted: np.ndarray = label_array(fitted.classes)[logits.argmax(-1).numpy()]
        if least is False:
            return predicted
        rejected = self._scope_score(*scope_inputs) < (0.5 if least is True else least)
        pairs = zip(predicted.tolist(), rejected.tolist(), strict=True)
        return label_array([outside if is_out else label for label, is_out in pairs])

    def scope_score(self, texts: Iterable[str]) -> np.ndarray:
        """Return (n,) float64, the probability that a text belongs to any of the classes.

        The rule was learned over tasks of which some classes had been left out, and is right where as many texts belong
        to none of the classes as to one; where fewer do, lower the threshold. AdapterError if there is no such rule.
        """
        return self._scope_score(self._answer(texts, "scope_inputs")[1])

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

    def nearest_tasks(self, count: int = 3) -> list[KnownTask]:
        """Return which of the corpora that the adapter was trained on the fitted task is most like, the nearest first.

        Args:
            count: how many corpora, each with its classes that are most like these.
        """
        index = self._adapter.index
        if index is None:
            raise AdapterError("this adapter has no index of the classes that it was trained on")
        return nearest_tasks(index, self.task_embedding_, whole_number("count", count, 1))

    @property
    def classes_(self) -> np.ndarray:
        """The labels (C,), sorted where they can be."""
        return label_array(self._now().classes)

    @property
    def support_(self) -> list[tuple[str, Any]] | None:
        """The examples, (text, label) each; None where a classifier was saved without their texts."""
        inputs = self._now().inputs
        return None if inputs is None or inputs.states else [(text, label) for text, label, _ in inputs.examples]

    @property
    def task_embedding_(self) -> TaskEmbedding:
        """What :func:`textmeta.similarity` compares tasks by."""
        return task_embedding(self._now().task, tuple(self._now().classes))

    @property
    def name_weight_(self) -> float:
        """How much names of classes count in an answer: 0 where none are read, 1 where there is nothing else.

        It is their share of the two factors that answers are made with, of likeness to the names and of the examples'
        scores. Names that tell the examples well come to some 0.4, those of other classes to 0.
        """
        task = self._now().task
        by_name, by_examples = float(task.name_scale[0]), float(task.scale[0] * task.weights.any())
        return by_name / (by_name + by_examples)

    @property
    def cv_accuracy_(self) -> float | None:
        """Share of the examples that are told right by others, in at most ten folds; None where there are no folds.

        An estimate for further texts of the same source, made when it is first asked for, by reading the examples once
        more. It is low where examples are few, for folds leave fewer of them to learn from, and names, unlabelled
        texts, weights and inner steps are left out; high where examples are near-copies of one another, or easier than
        the texts to come. Classes with one example take no part, and there must be two others.
        """
        return self._left_out().accuracy

    def suspect_labels(self) -> list[SuspectLabel]:
        """Return the examples that the others tell to be of another class than they were labelled, the surest first.

        They are told as for :attr:`cv_accuracy_`; ``row`` counts the examples as they were given, without those that
        count 0; ``text`` is None where token states were saved in its place. The first are worth a look, the last are
        hard examples. DataError where there are no two classes with two examples.
        """
        found = self._left_out()
        if found.accuracy is None:
            raise DataError(
                "suspect_labels: examples are told by others: expected two of each of two classes, at least"
            )
        return found.suspects

    def _left_out(self) -> LeftOut:
        fitted, learner = self._task()
        if fitted.inputs is None:
            raise NotFittedError("this classifier was saved without its examples, so they cannot be told: fit it again")
        if fitted not in _LEFT_OUT:
            numbers = {label: number for number, label in enumerate(fitted.classes)}
            support = [(text, numbers[label]) for text, label, _ in fitted.inputs.examples]
            found = left_out(fitted.inputs.read_by(learner), support, fitted.classes)
            shown = [(None if text in fitted.inputs.states else text, number) for text, number in support]
            _LEFT_OUT[fitted] = replace(found, support=shown)
        return _LEFT_OUT[fitted]

    def _stream(self, rows: Iterator[str], k: int, total: int, by: Held) -> Iterator[Top]:
        start, told, silent = 0, set[str](), not self.progress
        with tqdm(
            total=total or None, desc="predict", unit=" texts", leave=False, delay=BAR_AFTER, disable=silent
        ) as bar:
            while batch := list(islice(rows, self.batch_size)):
                tops = _tops(k, *self._answer(batch, "logits", by=by, start=start, told=told))
                start += len(batch)
                bar.update(len(batch))
                yield from tops

    def _answer(
        self, texts: Iterable[str], *wanted: str, by: Held | None = None, start: int = 0, told: set[str] | None = None
    ) -> Any:
        """Return the fitted task, and what is wanted of its :class:`Answers` to n texts: (n, …) float64 on the CPU.

        Of a batch of a stream, ``start`` is its first row, and ``told`` which warnings there were.
        """
        fitted, learner = by or self._task()  # held from beginning to end, whatever other threads fit
        given = [texts] if isinstance(texts, str) else texts
        texts = checked_texts(given, "predict", allow_empty=True, errors=self.errors, start=start)
        task = fitted.task.to(learner.adapter.initialisation.queries.device)
        parts = []
        starts = range(0, max(1, len(texts)), self.batch_size)
        silent = not self.progress or len(starts) < 2
        with torch.inference_mode(), warning_of(texts, "predict", start, told):
            for first in tqdm(starts, "predict", leave=False, delay=BAR_AFTER, disable=silent):
                answers = learner.answer_all(task, texts[first : first + self.batch_size])
                parts.append([getattr(answers, name)[0].cpu().double() for name in wanted])
        return fitted, *(torch.cat(part) for part in zip(*parts, strict=True))

    def _scope_score(self, scope_inputs: Tensor) -> np.ndarray:
        rule = self._learner.adapter.calibration.scope
        if rule is None:
            raise AdapterError(f"this adapter has no rule for what is out of scope, as {DEFAULT_ADAPTER} has")
        return np.asarray(scope_probability(rule.cpu().double(), scope_inputs))


def _tops(k: int, fitted: Fitted, logits: Tensor) -> list[Top]:
    top = logits.softmax(-1).sort(descending=True, stable=True)
    rows = zip(top.indices[:, :k].tolist(), top.values[:, :k].tolist(), strict=True)
    return [[(fitted.classes[n], p) for n, p in zip(*row, strict=True)] for row in rows]


# scikit-learn's wrapper of it calls the texts X, and takes them by no other name
_transform = FewShotClassifier.transform
FewShotClassifier.transform = wraps(_transform)(  # type: ignore[method-assign]
    lambda self, texts: _transform(self, texts)  # noqa: PLW0108
)
