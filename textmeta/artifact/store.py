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

from safetensors.torch import save as save_tensors
from torch import Tensor

from textmeta.artifact import peft_files
from textmeta.artifact.adapter import Adapter, FittedHead
from textmeta.artifact.card import CARD, is_edited, model_card
from textmeta.artifact.fitted_files import FITTED_FILES, fitted_files, read_fitted
from textmeta.artifact.folder import read_file, read_folder
from textmeta.artifact.index_files import INDEX_FILES, index_files, read_index
from textmeta.artifact.parsing import (
    check_members,
    finite_tensors,
    member,
    read_json,
    read_settings,
    read_tensors,
    write_json,
)
from textmeta.artifact.saving import write_folder
from textmeta.errors import AdapterError, HubError
from textmeta.hub import check_revision
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings, without_conditioning
from textmeta.model.conditioning import conditioning_shapes
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import LOG_ADAPTED_FACTOR, LORA, SCOPE, is_scalar, lora_factors
from textmeta.model.lora import LoraSettings
from textmeta.model.scope import RULE_SIZE
from textmeta.model.task_encoder import CENTRE
from textmeta.tasks import KnownTasks

__all__ = ["ADAPTER_FILES", "FORMAT_VERSION", "adapter_files", "load_adapter", "save_adapter"]

FORMAT_VERSION = 7  # of what is written, and all that is read
META, SCALARS = "textmeta.json", "textmeta.safetensors"
OLD_CARD = "README.old.md"
PROBE = "probe"  # beside the scalars
COMMIT, SHA256 = "[0-9a-f]{40}", "[0-9a-f]{64}"
REQUIRED = frozenset({peft_files.CONFIG, peft_files.WEIGHTS, META, SCALARS})
ADAPTER_FILES = REQUIRED | FITTED_FILES | INDEX_FILES  # all that a manifest may list


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
    tensors = finite_tensors(adapter.parameters)
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
            | finite_tensors({PROBE: adapter.probe})
        ),
        META: write_json(meta),
    }
    known, fitted = adapter.known_tasks, adapter.fitted
    if known is not None:
        files |= index_files(known, adapter.feature_size)
    if fitted is None:
        return {**files, CARD: model_card(meta, known=known).encode("utf-8", "replace")}
    count = None if fitted.support is None else len(fitted.support)
    card = model_card(meta, fitted.classes, count, known)
    return {**files, **fitted_files(fitted), CARD: card.encode("utf-8", "replace")}


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
    _check_format(meta, folder / META)
    adapter = _read_meta(meta, folder / META)
    factors, scalars = _read_factors(files, folder, adapter), read_tensors(files[SCALARS], folder / SCALARS)
    if PROBE not in scalars:
        raise AdapterError(f"{folder / SCALARS} has no {PROBE}")
    adapter = replace(adapter, probe=scalars.pop(PROBE))
    _check_scalars(scalars, factors, adapter.inner, folder / SCALARS)
    adapter = replace(adapter, parameters={**{LORA + name: value for name, value in factors.items()}, **scalars})
    adapter = replace(adapter, fitted=read_fitted(files, folder, adapter))
    return replace(adapter, known_tasks=read_index(files, folder, adapter.feature_size))


def _refuse_newer(folder: Path) -> None:
    """Say first of all if the format is newer: that it has other files, too, would else be called damage."""
    try:
        meta = read_json(read_file(folder, META), folder / META)
    except AdapterError:
        return  # whatever is wrong will be found, and named, in its turn
    if isinstance(meta.get("format_version"), int) and meta["format_version"] > FORMAT_VERSION:
        _check_format(meta, folder / META)


def _check_format(meta: Mapping[str, Any], path: Path) -> None:
    found = meta.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format version {found!r:.40}, this textmeta reads {FORMAT_VERSION}: the adapter was made by "
            "another version of textmeta: train it again"
        )


def _read_meta(meta: Mapping[str, Any], path: Path) -> Adapter:
    """Return what a ``textmeta.json`` says: an adapter without tensors."""
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
    calibrated = {SCOPE: (RULE_SIZE,), LOG_ADAPTED_FACTOR: ()}  # not every adapter has them
    shapes |= {name: shape for name, shape in calibrated.items() if name in scalars}
    given = {name: tuple(value.shape) for name, value in scalars.items()}
    if shapes != given:
        raise AdapterError(f"{path}: expected tensors {shapes}, found {given}")
    for name, value in scalars.items():
        if is_scalar(name) and not (value.exp().isfinite() & (value.exp() > 0)).all():
            raise AdapterError(f"{path}: {name}: the exponential of {value.tolist()} is no positive number")


def _peft_config(adapter: Adapter, factors: Iterable[str]) -> bytes:
    revision = adapter.commit or adapter.encoder.revision
    return peft_files.config_file(adapter.encoder.model, revision, adapter.lora, factors)
