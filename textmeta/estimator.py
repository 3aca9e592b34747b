"""What lies under the classifier: its adapter and encoder, loaded when they are needed; saving, sharing, copying."""

import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub import CommitInfo
from sklearn import exceptions
from sklearn.base import BaseEstimator

from textmeta.data.labels import one_of
from textmeta.encoder.encoder import LongTexts, device_of
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, SettingsError, TextMetaError
from textmeta.files import at_home, is_folder
from textmeta.hub import HubAccess
from textmeta.meta.adapter import Adapter
from textmeta.meta.general import load_any_encoder
from textmeta.meta.initialisation import Adapt, whole_number
from textmeta.meta.learner import TaskLearner
from textmeta.meta.shared import shared
from textmeta.sharing.locate import DEFAULT_ADAPTER
from textmeta.sharing.merged import write_merged
from textmeta.sharing.push import Destination, push_adapter
from textmeta.sharing.store import Fitted, load_adapter, save_adapter

__all__ = ["AdapterEstimator", "NotFittedError"]

NOT_FITTED = "this classifier has not been fitted: call fit(texts, labels) first"
HARMLESS = {"batch_size", "errors", "progress"}  # arguments that nothing is loaded or fitted by
LOADED = ("_loaded", "_reader", "_learner")  # all that is on the device


class NotFittedError(TextMetaError, exceptions.NotFittedError):  # type: ignore[misc]
    """A classifier was asked for predictions before ``fit``; scikit-learn's error of that name."""


class AdapterEstimator(BaseEstimator):  # type: ignore[misc]
    """An estimator of scikit-learn that loads an adapter and its encoder when they are first needed, and keeps them.

    What its arguments mean is said by :class:`~textmeta.classifier.FewShotClassifier`.
    """

    adapter: str | Path | Adapter | None
    encoder: str | None
    adapt: Adapt | None
    steps: int | None
    max_length: int | None
    long_texts: LongTexts
    batch_size: int
    device: str | torch.device | None
    precision: str
    errors: str
    class_weight: Any
    progress: bool

    _access = HubAccess()
    _weights = ""  # sha256 of an encoder that has no adapter of its own, which would know it
    _fitted: Fitted | None = None  # replaced as a whole: other threads may be predicting

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
    ) -> Self:
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
        if "adapter" in settings:
            told = f"given adapter={settings['adapter']!r:.60}: write FewShotClassifier(adapter=None, …) for none"
            raise SettingsError(f"from_pretrained loads the adapter {str(name)!r:.80}, {told}")
        access, encoder = HubAccess(token, cache_dir, local_files_only), settings.get("encoder")
        adapter, fitted = load_adapter(name, revision=revision, subfolder=subfolder, access=access, encoder=encoder)
        classifier = cls(adapter, **{"long_texts": adapter.encoder.long_texts, **settings})
        classifier._access = access
        _ = classifier._learner  # which loads the encoder
        classifier._fitted = fitted
        return classifier

    def to(self, device: str | torch.device | None) -> Self:
        """Move it to a device ("cuda", "cpu"; None is what there is), fitted or not; return the classifier itself."""
        device_of(device)
        self.device = device
        for name in LOADED:
            self.__dict__.pop(name, None)
        return self

    def save_pretrained(
        self, folder: str | Path, *, include_support: Literal[False, "states", "texts"] = False
    ) -> None:
        """Write the adapter, and the fitted task if there is one, to a folder.

        Args:
            folder: where to; replaced as a whole, or not at all (AdapterError).
            include_support: what to store of that which ``fit`` was given, which classes can be added and removed by
                after loading; the model card says so. False is nothing; "states" the token states of all texts, from
                which these can be guessed; "texts" the texts themselves, for everybody who gets the folder to read.
                Labels, weights and names of classes are stored with either.

        Raises:
            AdapterError: if the folder cannot be written, or there is nothing of that to store.
            EncoderError: if it is to be states, and the encoder cannot be split into frozen and adapted layers.
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
        include_support: Literal[False, "states", "texts"] = False,
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
        write_merged(folder, self._reader, own)

    @cached_property
    @torch.inference_mode(False)
    def _given(self) -> Adapter:
        """The adapter that was named or given, with what was asked for of long texts."""
        given = DEFAULT_ADAPTER if self.adapter is None else self.adapter
        found = given if isinstance(given, Adapter) else load_adapter(given, encoder=self.encoder)[0]
        length = found.encoder.max_length if self.max_length is None else whole_number("max_length", self.max_length, 3)
        found = replace(found, encoder=replace(found.encoder, max_length=length, long_texts=self.long_texts))
        return shared(found.digest, lambda: found)

    @property
    def _any_encoder(self) -> bool:
        """Whether the encoder may be another one than the adapter's."""
        return self.adapter is None or (self.encoder is not None and self.adapter == DEFAULT_ADAPTER)

    @property
    def _adapter(self) -> Adapter:
        """The adapter, on the CPU; of an encoder without one the general numbers."""
        return self._loaded.adapter.to(torch.device("cpu")) if self._any_encoder else self._given

    @cached_property
    @torch.inference_mode(False)
    def _loaded(self) -> TaskLearner:
        """What learns tasks as the adapter says; all classifiers with the same encoder and settings share it."""
        adapter, access, device = self._given, self._access, device_of(self.device)
        untrained = self.adapter is None

        def load() -> TaskLearner:
            how: dict[str, Any] = {"device": device, "precision": self.precision, "access": access}
            if self._any_encoder:
                length = adapter.encoder.max_length if self.max_length else None
                return load_any_encoder(adapter, self.encoder, untrained=untrained, max_length=length, **how)
            reader = adapter.load_reader(model=self.encoder, **how)
            return TaskLearner(reader, adapter.to(reader.encoder.device))

        place = _state_of(self.encoder or adapter.encoder.model)
        told = (self._any_encoder, untrained, self.max_length, str(device), self.precision, access)
        found = shared((adapter.digest, place, *told), load)
        if self._any_encoder:
            weights, self._weights = self._weights, found.adapter.weights_sha256
            if self._fitted is not None and self._weights != weights:
                raise AdapterError(
                    f"this classifier was fitted on other weights than those of {place[0]}: fit it again"
                )
        return found

    @cached_property
    def _reader(self) -> TokenStateReader:
        """What reads token states; the encoder is loaded the first time."""
        return self._loaded.reader  # type: ignore[return-value] # not a cache

    @cached_property
    @torch.inference_mode(False)
    def _learner(self) -> TaskLearner:
        """What learns tasks, as the arguments say."""
        whole_number("batch_size", self.batch_size, 1)
        one_of("errors", self.errors, ("raise", "replace"))
        one_of("progress", self.progress, (True, False))
        learner = self._given.learner.reduced(self.adapt, self.steps)
        adapter = self._loaded.adapter
        return TaskLearner(self._reader, replace(adapter, learner=replace(learner, layers=adapter.learner.layers)))

    def set_params(self, **params: Any) -> Self:
        """Set arguments of the class; after a change of what is loaded, nothing is fitted any more."""
        before = self.get_params()
        super().set_params(**params)
        changed = {name for name in params if params[name] is not before[name]}
        for name in ("_given", *LOADED, "_weights", "_fitted") if changed - HARMLESS else ("_learner",):
            self.__dict__.pop(name, None)  # the learner checks them
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
        return {name: value for name, value in state.items() if name not in LOADED}

    def _held(self) -> Self:
        """Return a copy as it is fitted now, which nobody else fits; it shares what is loaded."""
        self._now()
        made = copy.copy(self)
        made.__dict__ |= {name: getattr(self, name) for name in LOADED}
        return made

    def _now(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError(NOT_FITTED)
        return self._fitted

    def _to_store(self, include_support: Literal[False, "states", "texts"]) -> Fitted | None:
        """Return what is stored of the fitted task, if there is one."""
        one_of("include_support", include_support, (False, "states", "texts"))
        fitted = self._fitted
        if not include_support:
            return fitted and replace(fitted, inputs=None)
        if fitted is None or fitted.inputs is None or (include_support == "texts" and fitted.inputs.states):
            raise AdapterError("there are no support texts to include: fit first (a loaded classifier may lack them)")
        return fitted if include_support == "texts" else replace(fitted, inputs=fitted.inputs.as_states(self._reader))


def _state_of(model: str) -> tuple[Any, ...]:
    """Return what an encoder is known by as long as it is in memory: its id on the Hub, or its folder and files."""
    folder = Path(at_home(model))
    if not is_folder(folder):
        return (model,)
    files = ((path.name, path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.iterdir())
    return (str(folder.resolve()), *sorted(files))
