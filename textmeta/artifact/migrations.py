"""Format versions of the adapter folder: what this textmeta writes, and how older ones become it.

A change of the format gets the next number and a function here that brings the ``textmeta.json`` of the version before
up to it; reading applies them in turn, so that every adapter that was ever written loads. A tensor that adapters have
from some version on gets a row of :data:`NEW_TENSORS`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textmeta.errors import AdapterError
from textmeta.model.initialisation import (
    EVIDENCE_SLOPES,
    LOG_ADAPTED_FACTOR,
    LOG_NAME_WEIGHT,
    STRENGTH_PRIOR,
    TEMPERATURE_SLOPES,
)

__all__ = ["FORMAT_VERSION", "migrate", "migrate_tensors"]

FORMAT_VERSION = 7


def _from_1(meta: dict[str, Any]) -> dict[str, Any]:
    """Version 2 names the encoder's commit, and the versions of all libraries; its record names no encoder again."""
    settings = dict(meta["record"].get("settings", {}))
    if "encoder" in settings:
        known = {key: value for key, value in settings["encoder"].items() if key not in ("model", "revision")}
        settings["encoder"] = known
    record = {**meta["record"], **({"settings": settings} if settings else {})}
    versions = {"textmeta": meta.pop("textmeta_version", None)}
    return {**meta, "encoder": {**meta["encoder"], "commit": None}, "record": record, "versions": versions}


def _from_2(meta: dict[str, Any]) -> dict[str, Any]:
    """Version 3 may have a task encoder, and what it conditions; before there was none."""
    if "conditioning" in meta["inner"]:
        raise ValueError("inner.conditioning came with version 3")
    return {**meta, "inner": {**meta["inner"], "conditioning": None}}


def _from_3(meta: dict[str, Any]) -> dict[str, Any]:
    """Version 4 may have several strengths of LoRA to choose from; before, there was 1 alone."""
    if "strengths" in meta["inner"]:
        raise ValueError("inner.strengths came with version 4")
    return {**meta, "inner": {**meta["inner"], "strengths": [1.0]}}


def _as_it_is(meta: dict[str, Any]) -> dict[str, Any]:
    """Versions 5 and 7 have another tensor each (:data:`NEW_TENSORS`)."""
    return meta


def _from_5(meta: dict[str, Any]) -> dict[str, Any]:
    """Version 6 may take inner steps on the loss of neighbours, of falling sizes; before, there was no choice."""
    new = {"loss": "head", "schedule": "constant"}
    for name in sorted(new.keys() & meta["inner"].keys()):
        raise ValueError(f"inner.{name} came with version 6")
    return {**meta, "inner": {**meta["inner"], **new}}


MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _from_1,
    2: _from_2,
    3: _from_3,
    4: _as_it_is,
    5: _from_5,
    6: _as_it_is,
}

# version → what textmeta.safetensors has from then on, and the value that an older one gets; None, if not all have it
NEW_TENSORS: Mapping[int, Mapping[str, Tensor | None]] = {
    # a name weighs as much as an example; one temperature for all tasks
    4: {LOG_NAME_WEIGHT: torch.tensor(0.0), TEMPERATURE_SLOPES: torch.zeros(2), STRENGTH_PRIOR: torch.zeros(1)},
    5: {EVIDENCE_SLOPES: torch.zeros(2)},  # whatever the support set says, the same temperature
    7: {LOG_ADAPTED_FACTOR: None},  # without it, temperatures are the same before and after the inner steps
}


def migrate(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    """Bring the content of a ``textmeta.json`` up to :data:`FORMAT_VERSION`.

    Raises:
        AdapterError: if its version is newer, or none.
    """
    found = meta.get("format_version")
    if type(found) is not int or found < 1 or found > FORMAT_VERSION:
        newer = type(found) is int and found > FORMAT_VERSION
        raise AdapterError(
            f"{path} has format version {found!r}, this textmeta reads 1 to {FORMAT_VERSION}"
            + ("; a newer textmeta is needed: pip install --upgrade textmeta" if newer else "")
        )
    for version in range(found, FORMAT_VERSION):
        try:
            meta = {**MIGRATIONS[version](dict(meta)), "format_version": version + 1}
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise AdapterError(f"{path} is not what format version {version} is: {error}") from error
    return meta


def migrate_tensors(tensors: Mapping[str, Tensor], found: int, path: Path) -> dict[str, Tensor]:
    """Bring the content of a ``textmeta.safetensors`` up to :data:`FORMAT_VERSION`.

    Args:
        tensors: by name.
        found: format version of the folder, as :func:`migrate` has checked it.
        path: to name in errors.

    Raises:
        AdapterError: if a tensor came with a later version.
    """
    migrated = dict(tensors)
    for version in range(found + 1, FORMAT_VERSION + 1):
        for name, default in NEW_TENSORS.get(version, {}).items():
            if name in tensors:
                raise AdapterError(f"{path} is not what format version {found} is: {name} came with version {version}")
            if default is not None:
                migrated[name] = default.clone()
    return migrated
