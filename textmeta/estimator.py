"""What lies under the classifier: its adapter and encoder, loaded when they are needed; saving, sharing, copying."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from huggingface_hub import CommitInfo
from sklearn import exceptions
from sklearn.base import BaseEstimator

from textmeta.data.labels import one_of, whole_number
from textmeta.encoder.encoder import LongTexts, best_precision, device_of
from textmeta.errors import AdapterError, SettingsError, TextMetaError
from textmeta.files import at_home, is_folder
from textmeta.hub import HubAccess
from textmeta.meta.adapter import Adapter
from textmeta.meta.general import load_any_encoder
from textmeta.meta.initialisation import Adapt
from textmeta.meta.learner import TaskLearner
from textmeta.meta.shared import shared
from textmeta.sharing.locate import DEFAULT_ADAPTER, subfolder_prefix
from textmeta.sharing.merged import write_merged
from textmeta.sharing.push import push_adapter
from textmeta.sharing.store import Fitted, load_adapter, save_adapter

IncludeSupport = Literal[False, "states", "texts"]
NOT_FITTED = "this classifier has not been fitted since its arguments were set: call fit(texts, labels) first"
OF_ADAPTER = ("adapter", "encoder", "max_length", "long_texts")
OF_TASK = (*OF_ADAPTER, "adapt", "steps", "class_weight")
ARGUMENTS = (*OF_TASK, "device", "precision", "batch_size", "errors", "progress")


class NotFittedError(TextMetaError, exceptions.NotFittedError):  # type: ignore[misc]
    """A classifier was asked for predictions before ``fit``; scikit-learn's error of that name."""


class _Loaded(NamedTuple):
    """What was loaded, by the arguments as they read then; ``whole`` is what others share, and None until needed."""

    arguments: tuple[str, ...]
    adapter: Adapter
    whole: TaskLearner | None = None
    learner: TaskLearner | None = None


@dataclass(eq=False, repr=False)
class AdapterEstimator(BaseEstimator):  # type: ignore[misc]
    """An estimator of scikit-learn that loads an adapter and its encoder when they are first needed, and keeps them."""

    adapter: str | Path | Adapter | None = DEFAULT_ADAPTER
    _: KW_ONLY
    encoder: str | None = None
    adapt: Adapt | None = None
    steps: int | None = None
    class_weight: Literal["balanced"] | Mapping[Any, float] | None = "balanced"
    max_length: int | None = None
    long_texts: LongTexts | None = None
    batch_size: int = 512
    device: str | torch.device | None = None
    precision: Literal["auto", "bf16", "no"] = "auto"
    errors: Literal["raise", "replace"] = "raise"
    progress: bool = True

    # no arguments, and so without an annotation; replaced as a whole, for other threads may be predicting
    _access = HubAccess()
    _kept = cast("_Loaded | None", None)
    _fitted = cast("Fitted | None", None)

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
        backend: Literal["torch", "onnx"] = "torch",
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
            backend: "onnx" loads a folder that :meth:`export_onnx` wrote, as a classifier that only predicts, by ONNX
                Runtime. Its settings are ``threads``, ``batch_size``, ``errors`` and ``progress``.
            settings: the other arguments of the class, such as ``encoder``; ``adapt``, ``steps`` and ``class_weight``
                are by default those of the saved task.

        Raises:
            AdapterError: if the adapter is missing or damaged, of another format, or does not belong to the encoder.
            HubError: if the Hub has no such repository or revision, does not let this user at it, or cannot be reached.
            EncoderError: if the encoder cannot be loaded.
        """
        if one_of("backend", backend, ("torch", "onnx")) == "onnx":
            if revision is not None:
                raise SettingsError(f"backend='onnx' loads a folder, which has no revision (given {revision!r:.60})")
            loaded: Self = onnx_part("classifier").OnnxClassifier(Path(name) / subfolder_prefix(subfolder), **settings)
            return loaded
        if "adapter" in settings:
            told = f"given adapter={settings['adapter']!r:.60}: write FewShotClassifier(adapter=None, …) for none"
            raise SettingsError(f"from_pretrained loads the adapter {str(name)!r:.80}, {told}")
        access, encoder = HubAccess(token, cache_dir, local_files_only), settings.get("encoder")
        adapter, fitted = load_adapter(name, revision=revision, subfolder=subfolder, access=access, encoder=encoder)
        classifier = cls(adapter, **{**(fitted.settings if fitted else {}), **settings})
        classifier._access = access
        _ = classifier._learner  # which loads the encoder
        if fitted:
            own = classifier._arguments
            classifier._fitted = replace(fitted, weights_sha256=adapter.weights_sha256, arguments=own)
        return classifier

    def to(self, device: str | torch.device | None) -> Self:
        """Move it to a device ("cuda", "cpu"; None is what there is), fitted or not; return the classifier itself."""
        device_of(device)
        self.device = device
        return self

    def save_pretrained(self, folder: str | Path, *, include_support: IncludeSupport = False) -> None:
        """Write the adapter, and the fitted task if there is one, to a folder.

        Args:
            folder: where to; replaced as a whole, or not at all.
            include_support: what to store of what ``fit`` was given, so that classes can be added and removed after
                loading: nothing; "states", token states, from which texts can be guessed; or "texts", for everybody who
                gets the folder to read. Labels, weights and names of classes are stored with either, and the model card
                says so.

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
        include_support: IncludeSupport = False,
        base_model: str | None = None,
    ) -> CommitInfo:
        """Push the adapter, and the fitted task if there is one, to the Hub, in one commit or not at all; return it.

        Args:
            repo_id: ``owner/name``; the repository is made if there is none.
            revision: branch; made if there is none.
            subfolder: of the repository.
            token: an access token that may write; None takes the one that `hf auth login` stored.
            private: whether a new repository is private (None is the owner's default), and an old one has to be.
            commit_message: of the commit.
            include_support: see :meth:`save_pretrained`.
            base_model: id on the Hub of the encoder, where it was loaded from a folder.

        Raises:
            AdapterError: if it cannot be saved, or its encoder is no id on the Hub.
            HubError: no right to write, no answer, or somebody else pushed in between; nothing is changed then.
        """
        how: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "token": token, "private": private}
        how |= {"base_model": base_model, "commit_message": commit_message}
        return push_adapter(self._adapter, self._to_store(include_support), repo_id, **how)

    def merge(self, folder: str | Path) -> None:
        """Write the encoder with its LoRA merged, that of the fitted task if it has its own, as a sentence encoder.

        ``SentenceTransformer(folder)`` and ``AutoModel.from_pretrained(folder)`` load it without textmeta or PEFT.
        AdapterError if the folder holds anything.
        """
        factors = self._task()[0].task.factors if self.__sklearn_is_fitted__() else {}
        own = {name: value[0] for name, value in factors.items()} or self._adapter.initialisation.lora
        write_merged(folder, self._learner.reader, own)

    @property
    def _arguments(self) -> tuple[str, ...]:
        """The arguments as they are compared: an adapter by its content, all others by how they read."""
        given = [getattr(self, name) for name in ARGUMENTS]
        return tuple([value.digest if isinstance(value, Adapter) else repr(value) for value in given])

    @property
    @torch.inference_mode(False)  # no gradient could be taken of what is loaded in it
    def _given(self) -> Adapter:
        """The adapter that was named or given, with what was asked for of long texts."""
        now, kept = self._arguments, self._kept
        if kept is None or kept.arguments[: len(OF_ADAPTER)] != now[: len(OF_ADAPTER)]:
            found = DEFAULT_ADAPTER if self.adapter is None else self.adapter
            if not isinstance(found, Adapter):
                found = load_adapter(found, access=self._access, encoder=self.encoder)[0]
            own = found.encoder
            length = own.max_length if self.max_length is None else whole_number("max_length", self.max_length, 3)
            long_texts = own.long_texts if self.long_texts is None else self.long_texts
            made = replace(found, encoder=replace(own, max_length=length, long_texts=long_texts))
            kept = self._kept = _Loaded(now, shared(made.digest, lambda: made))
        return kept.adapter

    @property
    def _learner(self) -> TaskLearner:
        """What learns tasks, as the arguments say."""
        now, kept = self._arguments, self._kept
        if kept is None or kept.learner is None or kept.arguments != now:
            kept = self._kept = _Loaded(now, self._given, *self._load())  # at once: other threads may be predicting
        return kept.learner  # type: ignore[return-value]

    @property
    def _any_encoder(self) -> bool:
        """Whether the encoder may be another one than the adapter's."""
        return self.adapter is None or (self.encoder is not None and self.adapter == DEFAULT_ADAPTER)

    @property
    def _adapter(self) -> Adapter:
        """The adapter; of an encoder without one the general numbers."""
        if not self._any_encoder:
            return self._given
        own = self._learner.adapter
        return replace(own, learner=replace(self._given.learner, layers=own.learner.layers))

    @torch.inference_mode(False)
    def _load(self) -> tuple[TaskLearner, TaskLearner]:
        """Return what learns tasks as the adapter says, which all with the same settings share; and as is asked for."""
        whole_number("batch_size", self.batch_size, 1)
        one_of("errors", self.errors, ("raise", "replace"))
        one_of("progress", self.progress, (True, False))
        adapter, device, untrained = self._given, device_of(self.device), self.adapter is None
        precision = one_of("precision", self.precision, ("auto", "bf16", "no"))
        precision = best_precision(device) if precision == "auto" else precision
        learner = adapter.learner.reduced(self.adapt, self.steps)

        def load() -> TaskLearner:
            how: dict[str, Any] = {"device": device, "precision": precision, "access": self._access}
            if self._any_encoder:
                length = adapter.encoder.max_length if self.max_length else None
                return load_any_encoder(adapter, self.encoder, untrained=untrained, max_length=length, **how)
            reader = adapter.load_reader(model=self.encoder, **how)
            return TaskLearner(reader, adapter.to(reader.encoder.device))

        place = _state_of(self.encoder or adapter.encoder.model)
        told = (self._any_encoder, untrained, self.max_length, str(device), precision)
        whole = shared((adapter.digest, place, *told), load)
        own = replace(whole.adapter, learner=replace(learner, layers=whole.adapter.learner.layers))
        return whole, TaskLearner(whole.reader, own)

    def _now(self) -> Fitted:
        """Return what is fitted, by the arguments as they are."""
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(NOT_FITTED)
        return self._fitted  # type: ignore[return-value]

    def _task(self) -> tuple[Fitted, TaskLearner]:
        """Return what is fitted, and what it was learned by; AdapterError if the encoder is another one by now."""
        fitted, learner = self._now(), self._learner
        if fitted.weights_sha256 != learner.adapter.weights_sha256:
            model = learner.adapter.encoder.model
            raise AdapterError(f"this classifier was fitted on other weights than those of {model}: fit it again")
        return fitted, learner

    @cached_property
    def _lock(self) -> Any:
        """What one thread at a time holds to change what is fitted; no part of a copy."""
        return RLock()

    def __sklearn_is_fitted__(self) -> bool:
        fitted = self._fitted
        return fitted is not None and fitted.arguments[: len(OF_TASK)] == self._arguments[: len(OF_TASK)]

    def __sklearn_clone__(self) -> Self:
        made = super().__sklearn_clone__()
        if self._access != made._access:
            made._access = self._access
        return made  # type: ignore[no-any-return]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds: not the encoder, which is loaded again, nor an access token."""
        kept = self._kept and self._kept._replace(whole=None, learner=None)
        own = {"_access": replace(self._access, token=None), "_kept": kept}
        return {name: value for name, value in {**super().__getstate__(), **own}.items() if name != "_lock"}

    def _to_store(self, include_support: IncludeSupport) -> Fitted | None:
        """Return what is stored of the fitted task, if there is one."""
        one_of("include_support", include_support, (False, "states", "texts"))
        fitted = self._now() if self.__sklearn_is_fitted__() else None
        if fitted:
            steps = None if self.steps is None else int(self.steps)  # which may be NumPy's
            settings = {"adapt": self.adapt, "steps": steps, "class_weight": self.class_weight}
            fitted = replace(fitted, settings=settings)
            if self._any_encoder or include_support:
                self._task()  # is of the encoder that the folder will name
        if not include_support:
            return fitted and replace(fitted, inputs=None)
        if fitted is None or fitted.inputs is None or (include_support == "texts" and fitted.inputs.states):
            raise AdapterError("there are no support texts to include: fit first (a loaded classifier may lack them)")
        reader = self._learner.reader
        return fitted if include_support == "texts" else replace(fitted, inputs=fitted.inputs.as_states(reader))


def onnx_part(name: str) -> ModuleType:
    """Return a file of :mod:`textmeta.export` by its name; SettingsError if what it needs is not installed."""
    try:
        return import_module(f"textmeta.export.{name}")
    except ModuleNotFoundError as error:
        raise SettingsError(f"ONNX needs {error.name}: pip install 'textmeta[onnx]'") from error


def _state_of(model: str) -> tuple[Any, ...]:
    """Return what an encoder is known by as long as it is in memory: its id on the Hub, or its folder and files."""
    folder = Path(at_home(model))
    if not is_folder(folder):
        return (model,)
    files = ((path.name, path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.iterdir())
    return (str(folder.resolve()), *sorted(files))
