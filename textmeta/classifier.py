"""The classifier that users hold: fit on a handful of labelled texts, predict."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import CommitInfo
from sklearn import exceptions
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from torch import Tensor
from tqdm import tqdm

from textmeta.data.labels import (
    Label,
    LabelNames,
    checked_labels,
    checked_texts,
    checked_weights,
    label_array,
    task_classes,
)
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, DataError, SettingsError, TextMetaError
from textmeta.heads.scope import scope_probability
from textmeta.hub import HubAccess
from textmeta.meta.adapter import Adapter
from textmeta.meta.batch import Rows, TaskBatch
from textmeta.meta.initialisation import Adapt, whole_number
from textmeta.meta.learner import TaskLearner
from textmeta.meta.task_embedding import TaskEmbedding, task_embedding
from textmeta.nearest import KnownTask, nearest_tasks
from textmeta.sharing.locate import DEFAULT_ADAPTER
from textmeta.sharing.merged import write_merged
from textmeta.sharing.push import Destination, push_adapter
from textmeta.sharing.store import Fitted, load_adapter, save_adapter

__all__ = ["FewShotClassifier", "NotFittedError"]

BAR_AFTER = 5.0  # seconds
NOT_FITTED = "this classifier has not been fitted: call fit(texts, labels) first"


class NotFittedError(TextMetaError, exceptions.NotFittedError):  # type: ignore[misc]
    """A classifier was asked for predictions before ``fit``; scikit-learn's error of that name."""


class FewShotClassifier(ClassifierMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies texts by a few labelled examples of each class, by names of the classes, or by both.

    ``FewShotClassifier()`` has the adapter that comes with textmeta. It is an estimator of scikit-learn: making one
    stores the arguments alone. Adapter and encoder are loaded when they are first needed, and kept. Before ``fit``,
    whatever is asked of the fitted task raises NotFittedError.

    Args:
        adapter: one in hand, such as :meth:`textmeta.MetaTrainer.train` returns; or the name of one: a folder, an
            adapter shipped in the package (``textmeta/minilm-general``), or a repository on the Hub, looked for in this
            order. A task that was saved with it is left out (:meth:`from_pretrained` loads it, too).
        encoder: folder or Hub id to load the encoder from, if not from where the adapter says.
        adapt: what the inner steps change: a part of what the adapter has learned to change ("pooling", "lora"), or
            "none"; None is all of it.
        steps: number of inner steps, from 0 to what the adapter has learned; None is all.
        max_length: texts are cut after this many tokens; None is the adapter's own number.
        batch_size: texts answered at once, which bounds the memory that their token states take.
        device: where the encoder runs.
        precision: "bf16" runs the encoder's matrix products in bfloat16, "no" all in float32.
        errors: what half of a character in a text does: "raise" an error, or "replace" it.
        progress: whether a bar is shown where predicting takes long.
    """

    _access = HubAccess()
    _fitted: Fitted | None = None  # replaced as a whole: other threads may be predicting

    def __init__(
        self,
        adapter: str | Path | Adapter = DEFAULT_ADAPTER,
        *,
        encoder: str | None = None,
        adapt: Adapt | None = None,
        steps: int | None = None,
        max_length: int | None = None,
        batch_size: int = 512,
        device: str | torch.device = "cpu",
        precision: str = "no",
        errors: Literal["raise", "replace"] = "raise",
        progress: bool = True,
    ) -> None:
        self.adapter = adapter
        self.encoder = encoder
        self.adapt = adapt
        self.steps = steps
        self.max_length = max_length
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.errors = errors
        self.progress = progress

    @classmethod
    @torch.inference_mode(False)  # no gradient could be taken of what is loaded in it
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> "FewShotClassifier":
        """Load an adapter and its encoder at once; a classifier that was saved fitted comes back fitted.

        Nothing that is loaded is run or unpickled. The adapter is checked to be whole, and to belong to the encoder.

        Args:
            name: as ``adapter`` of the class.
            revision: branch, tag or commit on the Hub.
            subfolder: of the folder or repository.
            token: an access token for the Hub; None takes the one that `hf auth login` stored, False none.
            cache_dir: of downloads; by default the Hub library's own.
            local_files_only: use what the cache holds, and ask nobody.
            settings: the other arguments of the class, such as ``encoder``.

        Raises:
            AdapterError: if the adapter is missing or damaged, of another format, or does not belong to the encoder.
            HubError: if the Hub has no such repository or revision, does not let this user at it, or cannot be reached.
            EncoderError: if the encoder cannot be loaded.
        """
        access, encoder = HubAccess(token, cache_dir, local_files_only), settings.get("encoder")
        adapter, fitted = load_adapter(name, revision=revision, subfolder=subfolder, access=access, encoder=encoder)
        classifier = cls(adapter, **settings)
        classifier._access = access
        queries = classifier._learner.adapter.initialisation.queries
        classifier._fitted = fitted and replace(fitted, task=fitted.task.to(queries.device))
        return classifier

    @torch.inference_mode(False)  # the inner steps take gradients
    def fit(
        self,
        texts: Iterable[str] = (),
        labels: Iterable[Label] = (),
        *,
        sample_weight: Iterable[float] | None = None,
        label_names: LabelNames = "auto",
        unlabelled: Iterable[str] | None = None,
    ) -> "FewShotClassifier":
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
        given, rows = checked_texts(texts, "fit", errors=self.errors), checked_labels(labels)
        more = [] if unlabelled is None else checked_texts(unlabelled, "unlabelled", errors=self.errors)
        if len(given) != len(rows):
            raise DataError(f"fit: {len(given)} texts but {len(rows)} labels")
        weights = None if sample_weight is None else checked_weights(sample_weight, len(given))
        if weights is not None:
            given = [text for text, weight in zip(given, weights, strict=True) if weight]
            rows = [label for label, weight in zip(rows, weights, strict=True) if weight]
            weights = [weight for weight in weights if weight]
        classes, names = task_classes(rows, label_names)
        number = {label: i for i, label in enumerate(classes)}
        numbers = [number[label] for label in rows]
        learner = self._learner
        self._reader.encoder.warn_of_unknown([*given, *more], "fit")
        device = learner.adapter.initialisation.queries.device
        batch = TaskBatch.of(
            [given], [numbers], [len(classes)], [names], [more], device, [weights] if weights else None
        )
        try:
            with torch.no_grad():
                task = learner.learn(batch)
            finite = all(value.isfinite().all() for value in vars(task).values() if isinstance(value, Tensor))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            finite = False
        if not finite:
            raise AdapterError("the adapter makes numbers of this task that are not finite; it is not usable")
        self._fitted = Fitted(task, classes, list(zip(given, numbers, strict=True)))
        return self

    def predict_proba(self, texts: Iterable[str]) -> np.ndarray:
        """Return (n, classes) float64, the probability of each class, columns in the order of ``classes_``.

        A text's probabilities do not depend on the texts that it is sent with, but for rounding in the last digits.
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

    def predict_top(self, texts: Iterable[str], k: int = 3) -> list[list[tuple[Any, float]]]:
        """Return of each text its k most probable labels with their probabilities, the most probable first."""
        if not isinstance(k, int) or k < 1:
            raise DataError(f"predict_top: k must be a whole number from 1, given {k!r:.60}")
        fitted, logits = self._answer(texts, "logits")
        top = logits.softmax(-1).sort(descending=True, stable=True)
        rows = zip(top.indices[:, :k].tolist(), top.values[:, :k].tolist(), strict=True)
        return [[(fitted.classes[n], p) for n, p in zip(*row, strict=True)] for row in rows]

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
        reject = bool(reject) if isinstance(reject, np.bool_) else reject
        if not isinstance(reject, Real) or not 0 <= reject <= 1:
            raise DataError(f"predict: reject must be True, False or a number from 0 to 1, given {reject!r:.60}")
        fitted, logits, scope_inputs = self._answer(texts, "logits", "scope_inputs")
        predicted: np.ndarray = label_array(fitted.classes)[logits.argmax(-1).numpy()]
        if reject is False:
            return predicted
        rejected = self._scope_score(scope_inputs) < (0.5 if reject is True else reject)
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
        return nearest_tasks(index, self.task_embedding_, count)

    @property
    def classes_(self) -> np.ndarray:
        """The labels (C,), sorted where they can be."""
        return label_array(self._now().classes)

    @property
    def support_(self) -> list[tuple[str, Any]] | None:
        """The examples of ``fit``, (text, label) each; None where a classifier was saved without them."""
        fitted = self._now()
        return None if fitted.support is None else [(text, fitted.classes[number]) for text, number in fitted.support]

    @property
    def task_embedding_(self) -> TaskEmbedding:
        """What :func:`textmeta.similarity` compares tasks by."""
        return task_embedding(self._now().task, tuple(self._now().classes))

    def save_pretrained(self, folder: str | Path, *, include_support: bool = False) -> None:
        """Write the adapter, and the fitted task if there is one, to a folder.

        Args:
            folder: where to; replaced as a whole, or not at all (AdapterError).
            include_support: whether to store the texts of ``fit`` with their labels, for everybody who gets the folder
                to read; the model card says so.
        """
        save_adapter(folder, self._adapter, self._to_store(include_support))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        include_support: bool = False,
        base_model: str | None = None,
    ) -> CommitInfo:
        """Push the adapter, and the fitted task if there is one, to the Hub, in one commit or not at all; return it.

        Args:
            repo_id: ``owner/name``; the repository is made if there is none.
            revision: branch; made if there is none.
            subfolder: of the repository.
            token: an access token that may write; None takes the one that `hf auth login` stored.
            private: whether a new repository is private; None leaves that to the owner's default. One that is there
                already must be private, if this is True.
            commit_message: of the commit.
            include_support: see :meth:`save_pretrained`.
            base_model: id on the Hub of the encoder, where it was loaded from a folder.

        Raises:
            AdapterError: if it cannot be saved, or its encoder is no id on the Hub.
            HubError: no right to write, no answer, or somebody else pushed in between; nothing is changed then.
        """
        to = Destination(repo_id, revision, subfolder, token, private, commit_message)
        return push_adapter(self._adapter, self._to_store(include_support), to, base_model=base_model)

    def merge(self, folder: str | Path) -> None:
        """Write the encoder with its LoRA merged, that of the fitted task if it has its own, as a sentence encoder.

        ``SentenceTransformer(folder)`` and ``AutoModel.from_pretrained(folder)`` load it without textmeta or PEFT.

        Args:
            folder: where to; must not exist, or be empty (AdapterError).
        """
        factors = self._fitted.task.factors if self._fitted else {}
        own = {name: value[0] for name, value in factors.items()} or self._adapter.initialisation.lora
        write_merged(Path(folder), self._reader, own)

    @cached_property
    @torch.inference_mode(False)
    def _adapter(self) -> Adapter:
        """The adapter, with the length of texts that was asked for; one that was named is loaded the first time."""
        given = self.adapter
        found = given if isinstance(given, Adapter) else load_adapter(given, encoder=self.encoder)[0]
        if self.max_length is None:
            return found
        return replace(found, encoder=replace(found.encoder, max_length=whole_number("max_length", self.max_length, 3)))

    @cached_property
    @torch.inference_mode(False)
    def _reader(self) -> TokenStateReader:
        """What reads token states; the encoder is loaded the first time."""
        return self._adapter.load_reader(
            device=self.device, precision=self.precision, model=self.encoder, access=self._access
        )

    @cached_property
    @torch.inference_mode(False)
    def _learner(self) -> TaskLearner:
        """What learns tasks, as the arguments say."""
        whole_number("batch_size", self.batch_size, 1)
        if self.errors not in ("raise", "replace"):
            raise SettingsError(f"errors must be 'raise' or 'replace', given {self.errors!r:.60}")
        learner = self._adapter.learner.reduced(self.adapt, self.steps)
        return TaskLearner(self._reader, replace(self._adapter.to(self._reader.encoder.device), learner=learner))

    def set_params(self, **params: Any) -> "FewShotClassifier":
        """Set arguments of the class; after a change of what is loaded, nothing is fitted any more."""
        before = self.get_params()
        super().set_params(**params)
        if any(params[name] is not before[name] for name in params.keys() - {"batch_size", "errors", "progress"}):
            for name in ("_adapter", "_reader", "_learner", "_fitted"):
                self.__dict__.pop(name, None)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return self._fitted is not None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds: not the encoder, which is loaded again, nor an access token."""
        state = {**super().__getstate__(), "_access": replace(self._access, token=None)}
        return {name: value for name, value in state.items() if name not in ("_reader", "_learner")}

    def _now(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError(NOT_FITTED)
        return self._fitted

    def _answer(self, texts: Iterable[str], *wanted: str) -> Any:
        """Return the fitted task, and what is wanted of its :class:`Answers` to n texts: (n, …) float64 on the CPU."""
        fitted = self._fitted  # held from beginning to end, whatever other threads fit
        if fitted is None:
            raise NotFittedError(NOT_FITTED)
        given = [texts] if isinstance(texts, str) else texts
        texts = checked_texts(given, "predict", allow_empty=True, errors=self.errors)
        learner = self._learner
        self._reader.encoder.warn_of_unknown(texts, "predict")
        device = learner.adapter.initialisation.queries.device
        parts = []
        starts = range(0, max(1, len(texts)), self.batch_size)
        silent = not self.progress or len(starts) < 2
        for start in tqdm(starts, "predict", leave=False, delay=BAR_AFTER, disable=silent):
            with torch.inference_mode():
                answers = learner.answer(fitted.task, Rows.of([texts[start : start + self.batch_size]], device))
            parts.append([getattr(answers, name)[0].cpu().double() for name in wanted])
        return fitted, *(torch.cat(part) for part in zip(*parts, strict=True))

    def _scope_score(self, scope_inputs: Tensor) -> np.ndarray:
        rule = self._learner.adapter.calibration.scope
        if rule is None:
            raise AdapterError(f"this adapter has no rule for what is out of scope, as {DEFAULT_ADAPTER} has")
        return np.asarray(scope_probability(rule.cpu().double(), scope_inputs))

    def _to_store(self, include_support: bool) -> Fitted | None:
        """Return what is stored of the fitted task, if there is one."""
        fitted = self._fitted
        if include_support and (fitted is None or fitted.support is None):
            raise AdapterError("there are no support texts to include: fit first (a loaded classifier may lack them)")
        return fitted if fitted is None or include_support else replace(fitted, support=None)
