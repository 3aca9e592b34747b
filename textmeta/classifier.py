"""The classifier that users hold: fit on a handful of labelled texts, predict."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch import Tensor

from textmeta.artifact.adapter import Adapter, FittedHead
from textmeta.artifact.locate import DEFAULT_ADAPTER, load_with_encoder
from textmeta.artifact.merged import write_merged
from textmeta.artifact.publish import Destination, push_adapter
from textmeta.artifact.store import save_adapter
from textmeta.data.labels import Label, LabelNames, checked_labels, label_array, task_classes
from textmeta.data.texts import checked_texts
from textmeta.errors import AdapterError, DataError, NotFittedError, SettingsError
from textmeta.hub import HubAccess
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.task_learner import LearnedTask, learn_task, text_logits
from textmeta.meta.tasks import task_batch
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import lora_factors
from textmeta.tasks import KnownTask, KnownTasks, TaskEmbedding, checked_index, embed_task

__all__ = ["FewShotClassifier"]

NOT_FITTED = "this classifier has not been fitted: call fit(texts, labels) first"


class FewShotClassifier:
    """Classifies texts after a few gradient steps on a few labelled examples, or names of classes.

    ``FewShotClassifier()`` has the adapter that comes with textmeta; others are made by :meth:`from_pretrained`, or
    directly from the result of meta-training.

    Args:
        encoder: makes features.
        parameters: the meta-learned initialisation.
        inner: the inner loop that it was learned for.
        record: how it was trained; goes into what :meth:`save_pretrained` writes.
        known_tasks: index of the tasks that it was trained on, for :meth:`nearest_tasks`.

    Attributes:
        classes_: after ``fit``, the labels, sorted where they can be; columns of ``predict_proba`` are in this order.
        support_: after ``fit``, its examples, (text, label) each, without names of classes; None before, and where they
            were not saved.
        task_embedding_: after ``fit``, what the task encoder makes of its examples, to compare tasks by
            (:func:`textmeta.tasks.similarity`); None before, and where the adapter has no task encoder.
        known_tasks_: the index of training tasks; None where the adapter has none.
    """

    def __init__(
        self,
        encoder: Encoder | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        inner: InnerLoopSettings | None = None,
        record: Mapping[str, Any] | None = None,
        known_tasks: KnownTasks | None = None,
    ) -> None:
        if encoder is None and parameters is None and inner is None:
            adapter, encoder = load_with_encoder(DEFAULT_ADAPTER)
            parameters, inner, record = adapter.parameters, adapter.inner, record or adapter.record
            known_tasks = known_tasks or adapter.known_tasks
        if encoder is None or parameters is None or inner is None:
            raise SettingsError("FewShotClassifier needs encoder, parameters and inner, or none of them")
        self._encoder = encoder
        self._parameters = {name: value.detach().to(encoder.device) for name, value in parameters.items()}
        self._inner = inner
        self._record = dict(record or {})
        self._learned: LearnedTask | None = None  # after fit
        self.support_: list[tuple[str, Any]] | None = None
        self.task_embedding_: TaskEmbedding | None = None
        self.known_tasks_ = known_tasks

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "cpu",
        encoder: str | None = None,
    ) -> "FewShotClassifier":
        """Load a meta-trained adapter, or a fitted classifier, and its encoder.

        Nothing that is loaded is run or unpickled; hashes, names, shapes and numbers of the adapter are checked, and
        the encoder's weights must be those that it was trained on.

        Args:
            name: a folder that ``save_pretrained`` or a training recipe wrote, an adapter shipped in the package
                (``textmeta/minilm-…``), or the id of a repository on the Hub, looked for in this order.
            revision: branch, tag or commit on the Hub.
            subfolder: of the folder or repository.
            token: an access token for the Hub; None takes the one that `hf auth login` stored, False none.
            cache_dir: of downloads; by default the Hub library's own.
            local_files_only: use what the cache holds, and ask nobody.
            device: where the encoder runs.
            encoder: folder or Hub id to load the encoder from, if not from where the adapter says.

        Raises:
            AdapterError: if the adapter is missing or damaged, of a newer format, or does not belong to the encoder.
            HubError: if the Hub has no such repository or revision, does not let this user at it, or cannot be reached.
            EncoderError: if the encoder cannot be loaded.
        """
        access = HubAccess(token, cache_dir, local_files_only)
        adapter, loaded = load_with_encoder(name, revision, subfolder, access, device, encoder)
        classifier = cls(loaded, adapter.parameters, adapter.inner, adapter.record, adapter.known_tasks)
        if adapter.fitted is not None:
            classifier._learned = adapter.fitted.learned(loaded.device)
            classifier.task_embedding_ = adapter.fitted.task
            classifier.classes_ = label_array(adapter.fitted.classes)
            classifier.support_ = adapter.fitted.examples
        return classifier

    def fit(
        self, texts: Sequence[str] = (), labels: Iterable[Label] = (), *, label_names: LabelNames = None
    ) -> "FewShotClassifier":
        """Adapt to a task: at least two classes, each with a text or more, a name, or both.

        Args:
            texts: the support examples.
            labels: label of each: a string, a number or a truth value.
            label_names: what classes are called, as further support: a mapping from label to name, of any of the
                classes, and of classes without examples (zero shots); ``"labels"`` for the labels themselves, as words;
                None for no names. A name weighs as much as the adapter has learned.

        Returns:
            The classifier itself.

        Raises:
            DataError: naming the place, if a text or a name is no string or empty, a label is missing, of another type
                or equal to one of another type, ``label_names`` is something else, or there are fewer than two classes.
            AdapterError: if the adapter makes a head of this task that is not finite.
        """
        texts, rows = checked_texts(texts, "fit"), checked_labels(labels)
        if len(texts) != len(rows):
            raise DataError(f"fit: {len(texts)} texts but {len(rows)} labels")
        classes, names = task_classes(rows, label_names)
        index = {label: i for i, label in enumerate(classes)}
        support = task_batch(self._encoder, [texts], [[index[label] for label in rows]], [len(classes)], [names])
        learned = learn_task(self._encoder, self._parameters, self._inner, support)
        self.task_embedding_ = embed_task(self._encoder, self._parameters, self._inner, support, classes)
        self._learned = learned
        self.classes_ = label_array(classes)
        self.support_ = list(zip(texts, rows, strict=True))
        return self

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n, classes) float64, the probability of each class, columns in the order of ``classes_``.

        A text's probabilities do not depend on the texts that it is sent with, but for rounding in the last digits.

        Raises:
            NotFittedError: before ``fit``.
            DataError: if a text is no string.
        """
        return np.asarray(self._logits(texts).double().softmax(-1).cpu())

    def scope_score(self, texts: Sequence[str]) -> np.ndarray:
        """Return (n,) float64, the probability that a text belongs to any of the classes.

        The rule was learned over tasks of which some classes had been left out, and is right where as many texts belong
        to none of the classes as to one; where fewer do, lower the threshold.

        Raises:
            NotFittedError: before ``fit``.
            AdapterError: if the adapter has learned no such rule.
            DataError: if a text is no string.
        """
        return np.asarray(self._fitted_task().scope_probability(self._logits(texts)).double().cpu())

    def predict(self, texts: Sequence[str], *, reject: float | bool = False, outside: Any = None) -> np.ndarray:
        """Return (n,) the most probable label of each text, as given to ``fit``.

        Args:
            texts: n of them.
            reject: whether to reject texts that seem to belong to none of the classes: those whose :meth:`scope_score`
                is below this number; True is 0.5.
            outside: what is returned for these.

        Raises:
            NotFittedError: before ``fit``.
            AdapterError: if the adapter has learned no rule to reject by.
            DataError: if a text is no string, or ``reject`` no number from 0 to 1.
        """
        reject = bool(reject) if isinstance(reject, np.bool_) else reject
        if not isinstance(reject, Real) or not 0 <= reject <= 1:
            raise DataError(f"predict: reject must be True, False or a number from 0 to 1, given {reject!r:.60}")
        logits = self._logits(texts)
        predicted: np.ndarray = self.classes_[logits.double().softmax(-1).cpu().numpy().argmax(1)]
        if reject is False:
            return predicted
        threshold = 0.5 if reject is True else reject
        scores = self._fitted_task().scope_probability(logits).tolist()
        pairs = zip(predicted.tolist(), scores, strict=True)
        return label_array([outside if score < threshold else label for label, score in pairs])

    def score(self, texts: Sequence[str], labels: Iterable[Label]) -> float:
        """Return the share of texts whose label is predicted right."""
        rows, predicted = checked_labels(labels), self.predict(texts)
        if len(predicted) != len(rows) or not rows:
            raise DataError(f"score: {len(predicted)} texts but {len(rows)} labels, expected as many, and at least 1")
        return float(np.mean([given == true for given, true in zip(predicted, rows, strict=True)]))

    def nearest_tasks(self, count: int = 3) -> list[KnownTask]:
        """Return which of the tasks that the adapter was trained on the fitted one looks most like, the nearest first.

        Args:
            count: how many corpora, of each of which one task is compared: its classes that are most like these.

        Raises:
            AdapterError: if the adapter has no task encoder, or no index of the tasks that it was trained on.
            NotFittedError: before ``fit``.
        """
        known = checked_index(self.known_tasks_, self._inner)
        if self.task_embedding_ is None:
            raise NotFittedError(NOT_FITTED)
        return known.nearest(self.task_embedding_, count)

    def save_pretrained(self, folder: str | Path, *, include_support: bool = False) -> None:
        """Write the adapter, and the fitted task if there is one, to a folder.

        Args:
            folder: where to; replaced as a whole, or not at all.
            include_support: whether to store the texts of ``fit`` with their labels, for everybody who gets the folder
                to read; the model card says so.

        Raises:
            AdapterError: if the folder cannot be written, or there are no support texts to include.
        """
        save_adapter(folder, *self._content(include_support))

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
        """Push the adapter, and the fitted task if there is one, to the Hub, in one commit or not at all.

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

        Returns:
            The commit: ``oid``, ``commit_url``, ``repo_url``.

        Raises:
            AdapterError: if it cannot be saved, or its encoder is no id on the Hub.
            HubError: no right to write, no answer, or somebody else pushed in between; nothing is changed then.
        """
        adapter = Adapter.of(*self._content(include_support))
        to = Destination(repo_id, revision, subfolder, token, private, commit_message)
        return push_adapter(adapter, to, base_model=base_model)

    def merge(self, folder: str | Path) -> None:
        """Write the encoder with its LoRA merged, that of the fitted task if there is one, as a sentence encoder.

        ``SentenceTransformer(folder)`` and ``AutoModel.from_pretrained(folder)`` load it without textmeta or PEFT; its
        sentence vectors are the features that this classifier compares.

        Args:
            folder: where to; must not exist, or be empty.

        Raises:
            AdapterError: if the folder holds anything, or cannot be written.
        """
        factors = self._learned.factors if self._learned else lora_factors(self._parameters)
        write_merged(Path(folder), self._encoder, factors)

    def _content(self, include_support: bool) -> tuple[Any, ...]:
        """Return what is stored, in the order of the arguments of ``Adapter.of``."""
        if include_support and self.support_ is None:
            raise AdapterError("there are no support texts to include: fit first (a loaded classifier may lack them)")
        fitted = None
        if self._learned is not None:
            support = self.support_ if include_support else None
            fitted = FittedHead.of(self._learned, self.classes_.tolist(), support, self.task_embedding_)
        return self._encoder, self._parameters, self._inner, self._record, fitted, self.known_tasks_

    def _fitted_task(self) -> LearnedTask:
        if self._learned is None:
            raise NotFittedError(NOT_FITTED)
        return self._learned

    def _logits(self, texts: Sequence[str]) -> Tensor:
        """Return logits (n, C) of texts."""
        learned, texts = self._fitted_task(), checked_texts(texts, "predict", allow_empty=True)
        return text_logits(self._encoder, self._parameters, self._inner, learned, texts)
