"""The adapter folder: what meta-learning learned, as plain PEFT files plus textmeta's own; safetensors and JSON only.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's own format, so that
``PeftModel.from_pretrained`` loads the start that no task embedding has a say in. ``textmeta.safetensors`` holds step
sizes, the head's scalars, task encoder and memory, ``textmeta.json`` the encoder, the inner loop and the training
record, ``SHA256SUMS`` the hashes of all of these. ``tasks.safetensors`` and ``tasks.json`` are the index of training
tasks, where there is one. A fitted classifier adds ``classifier.safetensors`` and ``classifier.json``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from textmeta.artifact import peft_files
from textmeta.artifact.adapter import HEAD, Adapter, FittedHead
from textmeta.artifact.card import CARD, is_edited, model_card
from textmeta.artifact.folder import read_file, read_folder
from textmeta.artifact.index_files import INDEX_FILES, UNIT_TOLERANCE, index_files, read_index
from textmeta.artifact.migrations import FORMAT_VERSION, migrate, migrate_tensors
from textmeta.artifact.parsing import check_members, member, read_json, read_settings, read_tensors, write_json
from textmeta.artifact.saving import write_folder
from textmeta.data.labels import label_to_json, read_labels
from textmeta.errors import AdapterError, HubError
from textmeta.hub import check_revision
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings, without_conditioning
from textmeta.model.conditioning import conditioning_shapes
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import LORA, SCOPE, is_scalar, lora_factors
from textmeta.model.lora import LoraSettings
from textmeta.model.scope import RULE_SIZE, TEXT_INPUTS
from textmeta.model.task_encoder import CENTRE
from textmeta.tasks import KnownTasks, TaskEmbedding

__all__ = ["ADAPTER_FILES", "adapter_files", "load_adapter", "save_adapter"]

META, SCALARS = "textmeta.json", "textmeta.safetensors"
CLASSES = "classifier.json"
OLD_CARD = "README.old.md"
PROBE = "probe"  # beside the scalars
TEMPERATURE = "temperature"  # of a fitted head: ()
TASK_VECTOR, TASK_CLASSES = "task_vector", "task_classes"  # of a fitted head: (e,) and (C, d), of length 1
COMMIT, SHA256 = "[0-9a-f]{40}", "[0-9a-f]{64}"
REQUIRED = frozenset({peft_files.CONFIG, peft_files.WEIGHTS, META, SCALARS})
ADAPTER_FILES = REQUIRED | {HEAD, CLASSES} | INDEX_FILES  # all that a manifest may list


def save_adapter(
    folder: str | Path,
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    record: Mapping[str, Any],
    fitted: FittedHead | None = None,
    known_tasks: KnownTasks | None = None,
) -> None:
    """Write an adapter folder, replacing what was there; a crash leaves the old one or the new one, whole.

    A model card that somebody wrote or edited is kept beside the new one, as ``README.old.md``.

    Args:
        folder: where to.
        encoder: that the adapter belongs to.
        parameters: the initialisation.
        inner: the inner loop that it was learned for.
        record: how it was trained; must be JSON-able.
        fitted: of a fitted classifier.
        known_tasks: index of the tasks that it was trained on; the names of their classes are stored for everybody who
            gets the folder to read.

    Raises:
        AdapterError: if a value is not finite, the index does not belong to the adapter, or the folder cannot be
            replaced (:func:`~textmeta.artifact.saving.write_folder`).
    """
    folder = Path(folder)
    files = adapter_files(Adapter.of(encoder, parameters, inner, record, fitted, known_tasks))
    if (folder / CARD).is_file():
        old = (folder / CARD).read_bytes()
        if is_edited(old.decode("utf-8", "replace")):
            files[OLD_CARD] = old
    write_folder(folder, files, unlisted=frozenset({CARD, OLD_CARD}))


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of an adapter folder but the manifest: name to content.

    Raises:
        AdapterError: if a value is not finite, or the index does not belong to the adapter.
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
        SCALARS: save_tensors(
            {name: value for name, value in tensors.items() if not name.startswith(LORA)}
            | ({} if adapter.probe is None else _checked_tensors({PROBE: adapter.probe}))
        ),
        META: write_json(meta),
    }
    known, fitted = adapter.known_tasks, adapter.fitted
    if known is not None:
        files |= index_files(known, _hidden_size(adapter))
    if fitted is None:
        return {**files, CARD: model_card(meta, known=known).encode("utf-8", "replace")}
    classes, support = fitted.classes, fitted.support
    head = {**{LORA + name: value for name, value in fitted.factors.items()}, "weights": fitted.weights}
    for name, value in ((TEMPERATURE, fitted.temperature), (SCOPE, fitted.scope)):
        if value is not None:
            head[name] = value
    if fitted.task is not None:
        head |= {
            TASK_VECTOR: torch.from_numpy(fitted.task.vector),
            TASK_CLASSES: torch.from_numpy(fitted.task.classes),
        }
    count = None if support is None else len(support)
    return {
        **files,
        HEAD: save_tensors(_checked_tensors(head)),
        CLASSES: write_json({"classes": [label_to_json(label) for label in classes], "support": support}),
        CARD: model_card(meta, classes, count, known).encode("utf-8", "replace"),
    }


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder, checking hashes, format, names, shapes and finiteness.

    Nothing in it is run or imported, and nothing outside it is read but the blobs of the Hub's cache.

    Raises:
        AdapterError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    _refuse_newer(folder)
    files = read_folder(folder, ADAPTER_FILES)
    for name in sorted(REQUIRED - files.keys()):
        raise AdapterError(f"{folder} is no whole textmeta adapter: it has no {name}")
    meta = read_json(files[META], folder / META)
    adapter = _read_meta(migrate(meta, folder / META), folder / META)
    factors, scalars = _read_factors(files, folder, adapter), read_tensors(files[SCALARS], folder / SCALARS)
    scalars = migrate_tensors(scalars, meta["format_version"], folder / SCALARS)
    adapter = replace(adapter, probe=scalars.pop(PROBE, None))
    _check_scalars(scalars, factors, adapter.inner, folder / SCALARS)
    adapter = replace(adapter, parameters={**{LORA + name: value for name, value in factors.items()}, **scalars})
    if files.keys() & {HEAD, CLASSES}:
        adapter = replace(adapter, fitted=_read_fitted(files, folder, adapter))
    return replace(adapter, known_tasks=read_index(files, folder, _hidden_size(adapter)))


def _refuse_newer(folder: Path) -> None:
    """Say first of all if the format is newer: that it has other files, too, would else be called damage."""
    try:
        meta = read_json(read_file(folder, META), folder / META)
    except AdapterError:
        return  # whatever is wrong will be found, and named, in its turn
    if isinstance(meta.get("format_version"), int) and meta["format_version"] > FORMAT_VERSION:
        migrate(meta, folder / META)


def _read_meta(meta: Mapping[str, Any], path: Path) -> Adapter:
    """Return what a ``textmeta.json`` of today's format says: an adapter without tensors."""
    check_members(meta, ("format_version", "versions", "encoder", "lora", "inner", "record"), path)
    encoder = member(meta, "encoder", dict, path)
    settings = {key: value for key, value in encoder.items() if key not in ("commit", "weights_sha256")}
    if "cache_mb" in settings:
        raise AdapterError(f"{path}: unknown setting encoder.cache_mb: the memory of a machine is its owner's affair")
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
        raise AdapterError(f"{path}: encoder.model is {adapter.encoder.model!r:.80}: no path upwards is followed")
    for key, value, pattern in (("commit", adapter.commit, COMMIT), ("weights_sha256", adapter.weights_sha256, SHA256)):
        if value is not None and not re.fullmatch(pattern, value):
            raise AdapterError(f"{path}: encoder.{key} is {value!r:.80}, expected {pattern}")
    try:
        check_revision(adapter.encoder.revision)
    except HubError as error:
        raise AdapterError(f"{path}: encoder.revision: {error}") from error
    return adapter


def _read_factors(files: Mapping[str, bytes], folder: Path, adapter: Adapter) -> dict[str, Tensor]:
    path = folder / peft_files.WEIGHTS
    factors = peft_files.factors_of(read_tensors(files[peft_files.WEIGHTS], path), path)
    peft_files.check_config(files[peft_files.CONFIG], _peft_config(adapter, factors), folder / peft_files.CONFIG)
    for name, value in factors.items():
        if value.ndim != 2 or 0 in value.shape or value.shape[1 if ".lora_B." in name else 0] != adapter.lora.rank:
            raise AdapterError(
                f"{path}: {name} has shape {tuple(value.shape)}, expected a factor of rank {adapter.lora.rank}"
            )
    return dict(sorted(factors.items()))


def _check_scalars(
    scalars: Mapping[str, Tensor], factors: Mapping[str, Tensor], inner: InnerLoopSettings, path: Path
) -> None:
    factor_shapes = {name: tuple(value.shape) for name, value in factors.items()}
    expected = start_parameters(factor_shapes, without_conditioning(inner), hidden_size=0)
    shapes = {name: tuple(value.shape) for name, value in expected.items() if not name.startswith(LORA)}
    if inner.conditioning is not None:  # shapes alone: a size that somebody made up must not take memory
        hidden_size = scalars[CENTRE].numel() if CENTRE in scalars else 0
        shapes |= conditioning_shapes(inner.conditioning, factor_shapes, hidden_size)
    if SCOPE in scalars:  # where a rule was learned
        shapes[SCOPE] = (RULE_SIZE,)
    given = {name: tuple(value.shape) for name, value in scalars.items()}
    if shapes != given:
        raise AdapterError(f"{path}: expected tensors {shapes}, found {given}")
    for name, value in scalars.items():
        if is_scalar(name) and not (value.exp().isfinite() & (value.exp() > 0)).all():
            raise AdapterError(f"{path}: {name}: the exponential of {value.tolist()} is no positive number")


def _peft_config(adapter: Adapter, factors: Iterable[str]) -> bytes:
    revision = adapter.commit or adapter.encoder.revision
    return peft_files.config_file(adapter.encoder.model, revision, adapter.lora, factors)


def _read_fitted(files: Mapping[str, bytes], folder: Path, adapter: Adapter) -> FittedHead:
    for name in (HEAD, CLASSES):
        if name not in files:
            raise AdapterError(f"{folder} is no whole fitted classifier: it has no {name}")
    tensors = read_tensors(files[HEAD], folder / HEAD)
    weights = tensors.pop("weights", torch.empty(0))
    content = read_json(files[CLASSES], folder / CLASSES)
    check_members(content, ("classes", "support"), folder / CLASSES)
    classes = read_labels(member(content, "classes", list, folder / CLASSES), folder / CLASSES)
    if weights.ndim != 2 or len(weights) != len(classes) or len(classes) < 2:
        raise AdapterError(
            f"{folder / HEAD}: weights have shape {tuple(weights.shape)}, but {CLASSES} lists {len(classes)} classes; "
            "expected a row for each of at least 2"
        )
    temperature, task = _pop_temperature(tensors, folder / HEAD), _pop_task(tensors, classes, adapter, folder / HEAD)
    scope = _pop_scope(tensors, adapter, folder / HEAD)
    factors = lora_factors(adapter.parameters)
    if {n: v.shape for n, v in tensors.items()} != {LORA + n: v.shape for n, v in factors.items()}:
        raise AdapterError(f"{folder / HEAD} does not hold the adapter's LoRA factors")
    fitted = FittedHead(lora_factors(tensors), weights, classes, temperature=temperature, task=task, scope=scope)
    support = content.get("support")
    if support is None:
        return fitted
    for row, example in enumerate(member(content, "support", list, folder / CLASSES)):
        match example:
            case [str(), int(label)] if type(label) is int and 0 <= label < len(classes):
                continue
        raise AdapterError(f"{folder / CLASSES}, support {row}: expected a text and a class, found {example!r:.60}")
    return replace(fitted, support=[(text, label) for text, label in support])


def _hidden_size(adapter: Adapter) -> int | None:
    """Return the length of the features that an adapter's task encoder is for; None, where it has none."""
    return None if adapter.inner.conditioning is None else adapter.parameters[CENTRE].numel()


def _pop_temperature(tensors: dict[str, Tensor], path: Path) -> Tensor | None:
    """Take a fitted head's temperature out of its tensors; None, where it is of an older format."""
    value = tensors.pop(TEMPERATURE, None)
    if value is not None and (value.shape != () or not value > 0):
        raise AdapterError(f"{path}: {TEMPERATURE} must be one positive number, found {value!s:.60}")
    return value


def _pop_scope(tensors: dict[str, Tensor], adapter: Adapter, path: Path) -> Tensor | None:
    """Take a fitted task's rule for what is out of scope out of its tensors; None, where the adapter has none."""
    if SCOPE not in adapter.parameters:
        return None  # what is there all the same is no LoRA factor, and refused as that
    value = tensors.pop(SCOPE, torch.empty(0))
    if value.shape != (len(TEXT_INPUTS) + 1,):
        raise AdapterError(f"{path}: {SCOPE} has shape {tuple(value.shape)}, expected ({len(TEXT_INPUTS) + 1},)")
    return value


def _pop_task(tensors: dict[str, Tensor], classes: list[Any], adapter: Adapter, path: Path) -> TaskEmbedding | None:
    """Take a fitted task's embedding out of its tensors; None, where the adapter has no task encoder."""
    if adapter.inner.conditioning is None:
        return None  # what is there all the same is no LoRA factor, and refused as that
    shapes = {
        TASK_VECTOR: (adapter.inner.conditioning.task_encoder.size,),
        TASK_CLASSES: (len(classes), _hidden_size(adapter)),
    }
    found = []
    for name, shape in shapes.items():
        value = tensors.pop(name, torch.empty(0))
        if value.shape != shape or not ((value.double().norm(dim=-1) - 1).abs() <= UNIT_TOLERANCE).all():
            raise AdapterError(
                f"{path}: {name} must have shape {shape} and length 1, as the adapter's task encoder makes it; found "
                f"{value!s:.60} of shape {tuple(value.shape)}"
            )
        found.append(value.numpy())
    return TaskEmbedding(found[0], found[1], tuple(classes))


def _checked_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as they are stored.

    Raises:
        AdapterError: if a value is not finite.
    """
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise AdapterError(f"not saved: {name} has values that are not finite")
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}
