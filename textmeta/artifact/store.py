"""The adapter folder: what meta-learning learned, as plain PEFT files plus textmeta's own; safetensors and JSON only.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's own format, so that
``PeftModel.from_pretrained`` loads the start. ``textmeta.safetensors`` holds step sizes and temperature,
``textmeta.json`` the encoder, the inner loop and the training record, ``SHA256SUMS`` the hashes of all of these.
A fitted classifier adds ``classifier.safetensors`` and ``classifier.json``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from textmeta.artifact import peft_files
from textmeta.artifact.adapter import HEAD, Adapter, FittedHead
from textmeta.artifact.card import CARD, model_card
from textmeta.artifact.folder import read_folder, write_folder
from textmeta.artifact.migrations import FORMAT_VERSION, migrate
from textmeta.artifact.parsing import member, read_json, read_settings, read_tensors, write_json
from textmeta.errors import AdapterError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import LORA, Parameters, lora_factors
from textmeta.model.lora import LoraSettings

__all__ = ["ADAPTER_FILES", "adapter_files", "load_adapter", "save_adapter"]

META, SCALARS = "textmeta.json", "textmeta.safetensors"
CLASSES = "classifier.json"
REQUIRED = frozenset({peft_files.CONFIG, peft_files.WEIGHTS, META, SCALARS})
ADAPTER_FILES = REQUIRED | {HEAD, CLASSES}  # all that a manifest may list


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
        peft_files.CONFIG: _peft_config(adapter, factors),
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
    adapter = _read_meta(files[META], folder / META)
    adapter = replace(adapter, parameters=_read_parameters(files, folder, adapter))
    if files.keys() & {HEAD, CLASSES}:
        adapter = replace(adapter, fitted=_read_fitted(files, folder, lora_factors(adapter.parameters)))
    return adapter


def _read_meta(content: bytes, path: Path) -> Adapter:
    """Return what ``textmeta.json`` says: an adapter without tensors."""
    meta = migrate(read_json(content, path), path)
    encoder = member(meta, "encoder", dict, path)
    settings = {key: value for key, value in encoder.items() if key not in ("commit", "weights_sha256")}
    adapter = Adapter(
        parameters={},
        inner=read_settings(InnerLoopSettings, member(meta, "inner", dict, path), path, "inner"),
        encoder=read_settings(EncoderSettings, settings, path, "encoder"),
        lora=read_settings(LoraSettings, member(meta, "lora", dict, path), path, "lora"),
        weights_sha256=member(encoder, "weights_sha256", str, path),
        commit=member(encoder, "commit", str | None, path),
        record=member(meta, "record", dict, path),
        versions=member(meta, "versions", dict, path),
    )
    if ".." in PurePosixPath(adapter.encoder.model).parts:
        raise AdapterError(f"{path}: encoder.model is {adapter.encoder.model!r}: no path upwards is followed")
    return adapter


def _read_parameters(files: Mapping[str, bytes], folder: Path, adapter: Adapter) -> Parameters:
    tensors = read_tensors(files[peft_files.WEIGHTS], folder / peft_files.WEIGHTS)
    factors = peft_files.factors_of(tensors, folder / peft_files.WEIGHTS)
    peft_files.check_config(files[peft_files.CONFIG], _peft_config(adapter, factors), folder / peft_files.CONFIG)
    scalars = read_tensors(files[SCALARS], folder / SCALARS)
    expected = start_parameters({name: tuple(value.shape) for name, value in factors.items()}, adapter.inner)
    shapes = {name: tuple(value.shape) for name, value in expected.items() if not name.startswith(LORA)}
    given = {name: tuple(value.shape) for name, value in scalars.items()}
    if shapes != given:
        raise AdapterError(f"{folder / SCALARS}: expected tensors {shapes}, found {given}")
    return {**{LORA + name: value for name, value in sorted(factors.items())}, **scalars}


def _peft_config(adapter: Adapter, factors: Iterable[str]) -> bytes:
    revision = adapter.commit or adapter.encoder.revision
    return peft_files.config_file(adapter.encoder.model, revision, adapter.lora, factors)


def _read_fitted(files: Mapping[str, bytes], folder: Path, factors: Mapping[str, Tensor]) -> FittedHead:
    for name in (HEAD, CLASSES):
        if name not in files:
            raise AdapterError(f"{folder} is no whole fitted classifier: it has no {name}")
    tensors = read_tensors(files[HEAD], folder / HEAD)
    weights = tensors.pop("weights", torch.empty(0))
    content = read_json(files[CLASSES], folder / CLASSES)
    classes = member(content, "classes", list, folder / CLASSES)
    if weights.ndim != 2 or len(weights) != len(classes):
        raise AdapterError(
            f"{folder / HEAD}: weights have shape {tuple(weights.shape)}, but {CLASSES} lists {len(classes)} classes"
        )
    adapted = {name.removeprefix(LORA): value for name, value in tensors.items()}
    if {n: v.shape for n, v in adapted.items()} != {n: v.shape for n, v in factors.items()}:
        raise AdapterError(f"{folder / HEAD} does not hold the adapter's LoRA factors")
    support = content.get("support")
    if support is None:
        return FittedHead(adapted, weights, classes)
    for row, example in enumerate(member(content, "support", list, folder / CLASSES)):
        match example:
            case [str(), int(label)] if type(label) is int and 0 <= label < len(classes):
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
