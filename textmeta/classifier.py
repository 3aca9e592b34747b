"""The classifier that users hold: fit on a handful of labelled texts, predict, let classes come and go."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from sklearn.base import ClassifierMixin, TransformerMixin
from torch import Tensor

from textmeta.data.labels import (
    Label,
    LabelNames,
    checked_class_weight,
    checked_labels,
    checked_texts,
    checked_weights,
    few,
    is_word,
    label_array,
    readable_name,
    relative_weights,
    task_classes,
    whole_number,
)
from textmeta.encoder.encoder import warning_of
from textmeta.errors import AdapterError, DataError
from textmeta.estimator import AdapterEstimator, NotFittedError, onnx_part
from textmeta.meta.batch import TaskBatch
from textmeta.meta.learner import Answers, TaskLearner
from textmeta.meta.left_out import LeftOut, SuspectLabel, left_out
from textmeta.nearest import KnownTask, TaskEmbedding, nearest_tasks, task_embedding
from textmeta.predicting import PredictsTexts
from textmeta.sharing.store import Fitted
from textmeta.sharing.support import Example, FitInputs

NOT_FINITE = "the adapter makes numbers of this task that are not finite; it is not usable"
_LEFT_OUT: WeakKeyDictionary[Fitted, LeftOut] = WeakKeyDictionary()  # goes with the task, and into no pickle


class FewShotClassifier(PredictsTexts, ClassifierMixin, TransformerMixin, AdapterEstimator):  # type: ignore[misc]
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
        given, examples = self._examples("fit", texts, labels, sample_weight)
        more = () if unlabelled is None else checked_texts(unlabelled, "unlabelled", errors=self.errors)
        classes, found = task_classes([label for _, label, _ in examples], label_names)
        reads_labels = isinstance(label_names, str)
        names = {} if reads_labels else None if found is None else dict(zip(classes, found, strict=True))
        return self._learn("fit", FitInputs(examples, tuple(more), names, reads_labels), [*given, *more])

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
        given, examples = self._examples("partial_fit", texts, labels, sample_weight)
        known = [] if classes is None else checked_labels(classes, "partial_fit, classes, row")
        other = [] if classes is None else [label for _, label, _ in examples if label not in known]
        if other:
            raise DataError(f"partial_fit: {few(other)} is none of classes, {few(known)}")
        names = {label: readable_name(label) for label in known} if all(map(is_word, known)) else {}
        with self._lock:
            before = self._inputs() if self.__sklearn_is_fitted__() else FitInputs(names=names)
            return self._learn("partial_fit", replace(before, examples=(*before.examples, *examples)), given)

    def add_class(self, label: Label, examples: Iterable[str] = (), *, name: str | None = None) -> Self:
        """Learn anew with one more class, from examples, a name, or both.

        The name is by default the label, where labels are read. DataError if the label is a class already, has neither
        examples nor a name, or lacks a name that the others have; AdapterError as in :meth:`partial_fit`.
        """
        self._now()
        [label] = checked_labels([label], "add_class, label")
        texts = checked_texts(examples, "add_class", errors=self.errors)
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
            more = tuple((text, label, 1.0) for text in texts)
            return self._learn("add_class", replace(before, examples=before.examples + more), texts)

    def remove_class(self, label: Label) -> Self:
        """Learn anew without a class and its examples.

        DataError if there is no such class, or fewer than two would be left; AdapterError as in :meth:`partial_fit`.
        """
        with self._lock:
            before, [label] = self._inputs(), checked_labels([label], "remove_class, label")
            if label not in self._now().classes:
                raise DataError(f"remove_class: expected one of {few(self._now().classes)}, given {label!r:.60}")
            kept = tuple(example for example in before.examples if example[1] != label)
            names = before.names and {own: name for own, name in before.names.items() if own != label}
            return self._learn("remove_class", replace(before, examples=kept, names=names), [])

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

    def nearest_tasks(self, count: int = 3) -> list[KnownTask]:
        """Return of each training corpus the classes most like this task's, the ``count`` nearest corpora first."""
        index = self._adapter.index
        if index is None:
            raise AdapterError("this adapter has no index of the classes that it was trained on")
        return nearest_tasks(index, self.task_embedding_, whole_number("count", count, 1))

    def export_onnx(self, folder: str | Path, *, int8: bool = False) -> None:
        """Write the fitted task with its encoder as one graph of ONNX, with its tokenizer, to a folder.

        ``from_pretrained(folder, backend="onnx")`` predicts by it; so does anything else that runs ONNX, from token ids
        ``input_ids`` and ``attention_mask`` (rows, length) to ``logits`` (texts, classes) in the order of ``classes_``,
        and ``scope`` (texts,). It needs the extra ``onnx``.

        Args:
            folder: where to; replaced as a whole, or not at all.
            int8: whether the encoder's matrix products are of int8 numbers: about twice as fast, probabilities move by
                a few hundredths. The task is learned anew on what they make, for which its texts must be there.

        Raises:
            AdapterError: if the folder cannot be written, or the texts are not there.
            EncoderError: if the encoder cannot be exported.
        """
        write_onnx, own = onnx_part("graph").write_onnx, copy(self)
        own.precision = "no"  # whatever this one predicts in
        fitted, learner = own._task()
        inputs = fitted.inputs or FitInputs()
        if int8 and (fitted.inputs is None or inputs.states):
            told = "int8 learns the task anew, from its texts, which this classifier was saved without: fit it"
            raise AdapterError(f'{told}, or save it with include_support="texts"')
        learn = (lambda by: own._learn("fit", inputs, (), by=by)._now().task) if int8 else None
        write_onnx(folder, fitted, learner, learn)

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

        It is their share of the two factors, of likeness to the names and of the examples' scores. Names that tell the
        examples well come to some 0.4, those of other classes to 0.
        """
        task = self._now().task
        by_name, by_examples = float(task.name_scale[0]), float(task.scale[0] * task.weights.any())
        return by_name / (by_name + by_examples)

    @property
    def cv_accuracy_(self) -> float | None:
        """Share of the examples that are told right by others, in at most ten folds; None where there are no folds.

        An estimate for further texts of the same source, for which the examples are read once more. It is low where
        they are few, for folds leave fewer to learn from, and names, unlabelled texts, weights and inner steps are left
        out; high where they are near-copies of one another, or easier than the texts to come. Classes with one example
        take no part, and there must be two others.
        """
        return self._left_out().accuracy

    def suspect_labels(self) -> list[SuspectLabel]:
        """Return the examples that the others tell to be of another class than they were labelled, the surest first.

        They are told as for :attr:`cv_accuracy_`; ``row`` counts the examples as given, without those that count 0;
        ``text`` is None where token states were saved in its place. The first are worth a look, the last are hard
        examples. DataError where there are no two classes with two examples.
        """
        found = self._left_out()
        if found.accuracy is None:
            raise DataError("suspect_labels: expected two of each of two classes, at least: they are told by others")
        return [*found.suspects]

    def _examples(
        self, where: str, texts: Any, labels: Any, sample_weight: Any
    ) -> tuple[list[str], tuple[Example, ...]]:
        """Return texts, checked, and the examples that they make, without those that count 0."""
        given, rows = checked_texts(texts, where, errors=self.errors), checked_labels(labels)
        if len(given) != len(rows):
            raise DataError(f"{where}: {len(given)} texts but {len(rows)} labels")
        weights = [1.0] * len(given) if sample_weight is None else checked_weights(sample_weight, len(given))
        return given, tuple(example for example in zip(given, rows, weights, strict=True) if example[2])

    def _inputs(self) -> FitInputs:
        """Return what the classifier was fitted on."""
        inputs = self._task()[0].inputs
        if inputs is None:
            told = "this classifier was saved without its examples, so that it can be fitted, but not grow"
            raise AdapterError(f'{told}: save it with include_support="texts", or "states", which are no texts')
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

    def _left_out(self) -> LeftOut:
        fitted, learner = self._task()
        inputs = fitted.inputs
        if inputs is None:
            raise NotFittedError("this classifier was saved without its examples, so they cannot be told: fit it again")
        if fitted not in _LEFT_OUT:
            found = left_out(inputs.read_by(learner), inputs.examples, fitted.classes)
            shown = [one._replace(text=None if one.text in inputs.states else one.text) for one in found.suspects]
            _LEFT_OUT[fitted] = found._replace(suspects=shown)
        return _LEFT_OUT[fitted]

    def _answerer(self) -> tuple[Fitted, Callable[[list[str]], Answers]]:
        fitted, learner = self._task()  # held from beginning to end, whatever other threads fit
        task = fitted.task.to(learner.adapter.initialisation.queries.device)
        return fitted, lambda texts: learner.answer_all(task, texts)


# scikit-learn's wrapper of it calls the texts X, and takes them by no other name
_transform = FewShotClassifier.transform
FewShotClassifier.transform = wraps(_transform)(  # type: ignore[method-assign]
    lambda self, texts: _transform(self, texts)  # noqa: PLW0108
)
