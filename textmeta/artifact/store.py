"""The adapter folder: what meta-learning learned, as plain PEFT files plus textmeta's own; safetensors and JSON only.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's own format, so that
``PeftModel.from_pretrained`` loads the start. ``textmeta.safetensors`` holds step sizes and temperature,
``textmeta.json`` the encoder, the inner loop and the training record, ``SHA256SUMS`` the hashes of all of these.
A fitted classifier adds ``classifier.safetensors`` and ``classifier.json``.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from textmeta.artifact import peft_files
from textmeta.artifact.card import CARD, model_card
from textmeta.artifact.folder import read_folder, write_folder
from textmeta.artifact.migrations import FORMAT_VERSION, migrate
from textmeta.artifact.parsing import at, read_json, read_settings, read_tensors, write_json
from textmeta.errors import AdapterError, EncoderError
from textmeta.hub import HubAccess
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import LORA, Parameters, lora_factors
from textmeta.model.lora import LoraSettings

__all__ = ["ADAPTER_FILES", "Adapter", "FittedHead", "adapter_files", "load_adapter", "save_adapter"]

META, SCALARS = "textmeta.json", "textmeta.safetensors"
HEAD, CLASSES = "classifier.safetensors", "classifier.json"
REQUIRED = frozenset({peft_files.CONFIG, peft_files.WEIGHTS, META, SCALARS})
ADAPTER_FILES = REQUIRED | {HEAD, CLASSES}  # all that a manifest may list
LIBRARIES = ("textmeta", "torch", "transformers", "peft")


@dataclass(frozen=True)
class FittedHead:
    """What ``fit`` made of one task.

    Args:
        factors: every LoRA factor by name, (out, in).
        weights: (C, d), the head.
        classes: labels in the order of the head's rows, as JSON holds them.
        support: text and class (index) of each example that it was fitted on; None where they are not kept.
    """

    factors: dict[str, Tensor]
    weights: Tensor
    classes: list[Any]
    support: list[tuple[str, int]] | None = None


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder.

    Args:
        parameters: the initialisation.
        inner: the inner loop that it was learned for.
        encoder: settings of the encoder that it belongs to.
        lora: settings of the LoRA.
        weights_sha256: hash of the encoder's weights (:func:`~textmeta.model.pretrained.weights_digest`).
        commit: of the encoder's repository, where it came from the Hub.
        record: how it was trained.
        fitted: of a fitted classifier.
        versions: of the libraries that it was written with.
    """

    parameters: Parameters
    inner: InnerLoopSettings
    encoder: EncoderSettings
    lora: LoraSettings
    weights_sha256: str
    commit: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    fitted: FittedHead | None = None
    versions: dict[str, str | None] = field(default_factory=lambda: {name: version(name) for name in LIBRARIES})

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        parameters: Mapping[str, Tensor],
        inner: InnerLoopSettings,
        record: Mapping[str, Any],
        fitted: FittedHead | None = None,
    ) -> "Adapter":
        """Make the adapter of an encoder in hand; see the class's arguments."""
        settings, digest = encoder.settings, encoder.weights_sha256
        return cls(dict(parameters), inner, settings, encoder.lora, digest, encoder.commit, dict(record), fitted)

    def load_encoder(
        self, device: str | torch.device = "cpu", model: str | None = None, access: HubAccess | None = None
    ) -> Encoder:
        """Load the encoder that this adapter belongs to.

        Args:
            device: where it runs.
            model: where to load it from, if not from the id or folder that the adapter names.
            access: how the Hub is reached.

        Raises:
            AdapterError: if its weights are not those that the adapter was trained on.
            EncoderError: if it cannot be loaded.
        """
        encoder = self._any_encoder(device, model, access)
        if encoder.weights_sha256 != self.weights_sha256:
            raise AdapterError(
                f"the adapter belongs to {self.encoder.model} with weights {self.weights_sha256[:12]}…, but the "
                f"weights of {encoder.settings.model} are {encoder.weights_sha256[:12]}…"
            )
        shapes = encoder.factor_shapes
        given = {name: tuple(value.shape) for name, value in lora_factors(self.parameters).items()}
        if shapes != given:
            wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
            raise AdapterError(
                f"{peft_files.WEIGHTS}: {wrong[0]} has shape {given.get(wrong[0])}, expected "
                f"{shapes.get(wrong[0])} ({len(wrong)} such tensors)"
            )
        if self.fitted is not None and self.fitted.weights.shape[1] != encoder.hidden_size:
            raise AdapterError(
                f"{HEAD}: weights have {self.fitted.weights.shape[1]} columns, but features of "
                f"{encoder.settings.model} have {encoder.hidden_size}"
            )
        return encoder

    def _any_encoder(self, device: str | torch.device, model: str | None, access: HubAccess | None) -> Encoder:
        """Load the encoder; of one on the Hub the commit that the adapter was trained on, if it can be had."""
        if model:
            return Encoder(replace(self.encoder, model=model, revision=None), self.lora, device, access=access)
        try:
            return Encoder(
                replace(self.encoder, revision=self.commit or self.encoder.revision), self.lora, device, access=access
            )
        except EncoderError:
            if self.commit is None:
                raise
            # any other copy will do if its weights are the same, and the caller compares them
            return Encoder(self.encoder, self.lora, device, access=access)


def save_adapter(
    folder: str | Path,
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    record: Mapping[str, Any],
    fitted: FittedHead | None = None,
) -> None:
    """Write an adapter folder, replacing what was there; a crash leaves the old one or the new one, whole.

    Args:
        folder: where to.
        encoder: that the adapter belongs to.
        parameters: the initialisation.
        inner: the inner loop that it was learned for.
        record: how it was trained; must be JSON-able.
        fitted: of a fitted classifier.

    Raises:
        AdapterError: if a value is not finite, or the folder cannot be replaced
            (:func:`~textmeta.artifact.folder.write_folder`).
    """
    adapter = Adapter.of(encoder, parameters, inner, record, fitted)
    write_folder(Path(folder), adapter_files(adapter), unlisted=frozenset({CARD}))


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of an adapter folder but the manifest: name to content.

    Raises:
        AdapterError: if a value is not finite.
    """
    tensors = _checked_tensors(adapter.parameters)
    factors = lora_factors(tensors)
    encoder_settings = asdict(adapter.encoder)
    del encoder_settings["cache_mb"]  # the machine's affair, not the adapter's
    meta = {
        "format_version": FORMAT_VERSION,
        "versions": adapter.versions,
        "encoder": {**encoder_settings, "commit": adapter.commit, "weights_sha256": adapter.weights_sha256},
        "lora": asdict(adapter.lora),
        "inner": asdict(adapter.inner),
        "record": adapter.record,
    }
    files = {
        peft_files.CONFIG: _peft_config(adapter.encoder, adapter.commit, adapter.lora, factors),
        peft_files.WEIGHTS: save_tensors(peft_files.tensor_names(factors), metadata={"format": "pt"}),
        SCALARS: save_tensors({name: value for name, value in tensors.items() if not name.startswith(LORA)}),
        META: write_json(meta),
    }
    if adapter.fitted is None:
        return {**files, CARD: model_card(meta).encode()}
    fitted, classes, support = adapter.fitted, adapter.fitted.classes, adapter.fitted.support
    head = {**{LORA + name: value for name, value in fitted.factors.items()}, "weights": fitted.weights}
    return {
        **files,
        HEAD: save_tensors(_checked_tensors(head)),
        CLASSES: write_json({"classes": classes, "support": support}),
        CARD: model_card(meta, classes, None if support is None else len(support)).encode(),
    }


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder, checking hashes, format, names, shapes and finiteness.

    Nothing in it is run or imported, and nothing outside it is read but the blobs of the Hub's cache.

    Raises:
        AdapterError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    files = read_folder(folder)
    for name in sorted(files.keys() ^ REQUIRED):
        if name in REQUIRED:
            raise AdapterError(f"{folder} is no whole textmeta adapter: it has no {name}")
        if name not in ADAPTER_FILES:
            raise AdapterError(f"{folder / name} does not belong to an adapter, but its manifest lists it")
    path = folder / META
    meta = migrate(read_json(files[META], path), path)
    inner = read_settings(InnerLoopSettings, at(meta, path, "inner"), path, "inner")
    lora = read_settings(LoraSettings, at(meta, path, "lora"), path, "lora")
    fields = dict(_mapping(meta, path, "encoder"))
    weights_sha256, commit = fields.pop("weights_sha256", None), fields.pop("commit", None)
    if not isinstance(weights_sha256, str) or not isinstance(commit, str | None):
        raise AdapterError(f"{path}: expected a sha256 and a commit in 'encoder', found {weights_sha256!r}, {commit!r}")
    encoder = read_settings(EncoderSettings, fields, path, "encoder")
    if ".." in PurePosixPath(encoder.model).parts:
        raise AdapterError(f"{path}: encoder.model is {encoder.model!r}: a path that leads upwards is not followed")

    tensors = read_tensors(files[peft_files.WEIGHTS], folder / peft_files.WEIGHTS)
    factors = peft_files.factors_of(tensors, folder / peft_files.WEIGHTS)
    must_be = _peft_config(encoder, commit, lora, factors)
    peft_files.check_config(files[peft_files.CONFIG], must_be, folder / peft_files.CONFIG)
    scalars = read_tensors(files[SCALARS], folder / SCALARS)
    expected = start_parameters({name: tuple(value.shape) for name, value in factors.items()}, inner)
    shapes = {name: tuple(value.shape) for name, value in expected.items() if not name.startswith(LORA)}
    given = {name: tuple(value.shape) for name, value in scalars.items()}
    if shapes != given:
        raise AdapterError(f"{folder / SCALARS}: expected tensors {shapes}, found {given}")
    parameters = {**{LORA + name: value for name, value in sorted(factors.items())}, **scalars}
    fitted = _read_fitted(files, folder, factors) if files.keys() & {HEAD, CLASSES} else None
    record, versions = dict(_mapping(meta, path, "record")), dict(_mapping(meta, path, "versions"))
    return Adapter(parameters, inner, encoder, lora, weights_sha256, commit, record, fitted, versions)


def _peft_config(
    encoder: EncoderSettings, commit: str | None, lora: LoraSettings, factors: Mapping[str, Tensor]
) -> bytes:
    return peft_files.config_file(encoder.model, commit or encoder.revision, lora, factors)


def _read_fitted(files: Mapping[str, bytes], folder: Path, factors: Mapping[str, Tensor]) -> FittedHead:
    for name in (HEAD, CLASSES):
        if name not in files:
            raise AdapterError(f"{folder} is no whole fitted classifier: it has no {name}")
    tensors = read_tensors(files[HEAD], folder / HEAD)
    weights = tensors.pop("weights", torch.empty(0))
    content = read_json(files[CLASSES], folder / CLASSES)
    classes, support = content.get("classes"), content.get("support")
    if not isinstance(classes, list) or weights.ndim != 2 or len(weights) != len(classes):
        raise AdapterError(
            f"{folder / HEAD}: weights have shape {tuple(weights.shape)}, but {CLASSES} lists "
            f"{len(classes) if isinstance(classes, list) else 'no'} classes"
        )
    adapted = {name.removeprefix(LORA): value for name, value in tensors.items()}
    if {n: v.shape for n, v in adapted.items()} != {n: v.shape for n, v in factors.items()}:
        raise AdapterError(f"{folder / HEAD} does not hold the adapter's LoRA factors")
    if support is None:
        return FittedHead(adapted, weights, classes)
    for row, example in enumerate(support if isinstance(support, list) else [support]):
        match example:
            case [str(), int(label)] if 0 <= label < len(classes):
                continue
        raise AdapterError(f"{folder / CLASSES}, support {row}: expected a text and a class, found {example!r:.60}")
    return FittedHead(adapted, weights, classes, [(text, label) for text, label in support])


def _checked_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as they are stored.

    Raises:
        AdapterError: if a value is not finite.
    """
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise AdapterError(f"not saved: {name} has values that are not finite")
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}


def _mapping(meta: Mapping[str, Any], path: Path, key: str) -> dict[str, Any]:
    found = at(meta, path, key)
    if not isinstance(found, dict):
        raise AdapterError(f"{path}: expected an object for {key!r}, found {type(found).__name__}")
    return found
