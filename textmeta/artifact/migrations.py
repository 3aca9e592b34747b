"""Format versions of ``textmeta.json``: what this textmeta writes, and how older ones become it.

A change of the format gets the next number and a function here that brings the version before up to it; reading applies
them in turn, so that every adapter that was ever written loads.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from textmeta.errors import AdapterError

__all__ = ["FORMAT_VERSION", "migrate"]

FORMAT_VERSION = 3


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


MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2}


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
