"""Reading JSON and safetensors that may come from anybody: strictly, with the file named in every error."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from textmeta.errors import AdapterError, SettingsError

__all__ = ["check_members", "finite_tensors", "member", "read_json", "read_settings", "read_tensors", "write_json"]

S = TypeVar("S")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_json(content: Any) -> bytes:
    """Return JSON as every file of an adapter has it: sorted, so that equal content has equal bytes.

    Raises:
        AdapterError: if JSON has no such value.
    """
    try:
        return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"not saved: what is to be stored as JSON cannot be: {error}") from error


def read_json(content: bytes, path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Args:
        content: of the file.
        path: to name in errors.

    Raises:
        AdapterError: if it is none, gives a key twice, holds NaN or infinity, or is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            raise ValueError(f"the key {counts.most_common(1)[0][0]!r:.80} is given twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(f"{number} is no finite number")
        return float(number)

    try:
        parsed = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def read_tensors(content: bytes, path: Path, *, any_float: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, in float32.

    Args:
        content: of the file.
        path: to name in errors.
        any_float: accept, and convert, other floating-point types.

    Raises:
        AdapterError: if it is damaged, or a tensor is not float32 or has values that are not finite.
    """
    try:
        tensors = load_tensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error
    for key, value in tensors.items():
        if value.dtype != torch.float32 and not (any_float and value.dtype in FLOATS):
            raise AdapterError(f"{path}: tensor {key!r} is {value.dtype}, expected torch.float32")
        if not value.isfinite().all():
            raise AdapterError(f"{path}: tensor {key!r} has values that are not finite")
    return {key: value.float() for key, value in tensors.items()}


def finite_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as they are stored.

    Raises:
        AdapterError: if a value is not finite.
    """
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise AdapterError(f"not saved: {name} has values that are not finite")
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}


def read_settings(kind: Callable[..., S], fields: Mapping[str, Any], path: Path, part: str) -> S:
    """Make a dataclass of settings from a JSON object, each value of exactly the type that the dataclass declares.

    A setting that is a dataclass itself, or may be one, is read from a JSON object in the same way.

    Args:
        kind: the dataclass.
        fields: name to value.
        path: to name in errors.
        part: what the settings are of, to name in errors: ``inner`` or, nested, ``inner.conditioning``.

    Raises:
        AdapterError: for an unknown or missing name, a value of another type, or one out of range.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in hints:
            raise AdapterError(f"{path}: unknown setting {part}.{name:.60}; known are {', '.join(sorted(hints))}")
        nested: list[Any] = [hint for hint in (hints[name], *get_args(hints[name])) if is_dataclass(hint)]
        if nested and isinstance(value, dict):
            values[name] = read_settings(nested[0], value, path, f"{part}.{name}")
        elif _fits(value, hints[name]):
            values[name] = tuple(value) if isinstance(value, list) else value
        else:
            raise AdapterError(f"{path}: {part}.{name} is {value!r:.60}, expected {hints[name]}")
    try:
        return kind(**values)
    except (TypeError, SettingsError) as error:
        named = re.match(r"\w+ (\w+) must", str(error))  # as settings say which of them is out of range
        where = f"{part}.{named[1]}" if named and named[1] in fields else part
        raise AdapterError(f"{path}: {where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a declared type; JSON has lists for tuples, and may write 1 for 1.0."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:
        if not isinstance(value, list) or (parts[-1] is not Ellipsis and len(value) != len(parts)):
            return False
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return all(_fits(item, part) for item, part in zip(value, kinds, strict=True))
    if hint in (None, NoneType):
        return value is None
    if hint is float and type(value) is int:
        return abs(value) <= 2**53  # as exact as a float
    return type(value) is hint


def check_members(content: Mapping[str, Any], known: Collection[str], path: Path) -> None:
    """Check that a JSON object has no other members than these.

    Raises:
        AdapterError: naming one that it should not have.
    """
    for key in sorted(content.keys() - set(known)):
        raise AdapterError(f"{path}: unexpected {key!r:.60}; known are {', '.join(sorted(known))}")


def member(content: Mapping[str, Any], key: str, kind: Any, path: Path) -> Any:
    """Return a member of a JSON object, of exactly this type (a union means one of several).

    Raises:
        AdapterError: if it is missing, or of another type.
    """
    if key not in content:
        raise AdapterError(f"{path} lacks {key!r}")
    if not _fits(content[key], kind):
        raise AdapterError(f"{path}: {key!r} is {content[key]!r:.60}, expected {kind}")
    return content[key]
