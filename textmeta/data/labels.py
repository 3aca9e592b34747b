"""Labels of any hashable type, as a classifier is given them, returns them and stores them."""

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from textmeta.data.texts import checked_text
from textmeta.errors import AdapterError, DataError

__all__ = [
    "LabelNames",
    "checked_labels",
    "label_array",
    "label_to_json",
    "read_labels",
    "readable_name",
    "sorted_if_possible",
    "task_classes",
]

LabelNames = Mapping[Hashable, str] | Literal["labels"] | None
MAX_DEPTH = 20  # of tuples in tuples


def checked_labels(labels: Iterable[Hashable], where: str = "row") -> list[Any]:
    """Return labels as Python's own values.

    Args:
        labels: to check.
        where: what the message calls the place of one, before its number.

    Raises:
        DataError: naming the row, if one is missing or not hashable.
    """
    if isinstance(labels, str):
        raise DataError("expected a list of labels, given one string; put it into a list")
    # scalars of NumPy and PyTorch, the latter hashed by identity, become Python's own
    checked = [label.item() if isinstance(label, np.generic | Tensor) else label for label in labels]
    for row, label in enumerate(checked):
        try:
            hash(label)
        except TypeError as error:
            given = f"label {label!r:.60} of type {type(label).__name__}"
            raise DataError(f"{where} {row}: {given} is not hashable") from error
        if _is_missing(label):
            raise DataError(f"{where} {row}: the label is missing ({label})")
    return checked


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except TypeError:
        return True  # pandas' NA, which has no truth value


def task_classes(labels: Sequence[Any], label_names: LabelNames) -> tuple[list[Any], list[str | None]]:
    """Return the classes of a task, sorted where they can be, and the name of each that has one.

    Args:
        labels: of the examples, checked.
        label_names: label → name; its labels are classes even without examples. ``"labels"`` for the labels themselves,
            as words; None for no names.

    Raises:
        DataError: if there are fewer than two classes, a name is no string or empty, a label is equal to another but of
            another type, or ``label_names`` is something else.
    """
    of_labels = isinstance(label_names, str) and label_names == "labels"  # an array would compare item by item
    if not (label_names is None or of_labels or isinstance(label_names, Mapping)):
        raise DataError(
            "fit: label_names must be None, 'labels', or a mapping from labels to names, given "
            f"{type(label_names).__name__} {label_names!r:.60}"
        )
    keys = checked_labels(label_names, "fit, label_names, key") if isinstance(label_names, Mapping) else []
    classes = sorted_if_possible(dict.fromkeys([*labels, *keys]))
    if len(classes) < 2:
        named = " (label_names 'labels' names no further ones: give a mapping)" if of_labels else ""
        raise DataError(f"fit needs examples or names of at least 2 classes, found {len(classes)}: {classes}{named}")
    same = {label: label for label in classes}
    for part, given in (("", labels), ("label_names, key ", keys)):
        for row, label in enumerate(given):
            if type(same[label]) is not type(label):
                raise DataError(
                    f"fit, {part or 'row '}{row}: label {label!r} equals {same[label]!r} but is of another type; a "
                    "class needs one label"
                )
    names: dict[Any, object] = {}
    if isinstance(label_names, Mapping):
        names = dict(zip(keys, label_names.values(), strict=True))
    elif of_labels:
        names = {label: readable_name(str(label)) for label in classes}
    checked = {label: checked_text(name, f"fit, label_names of {label!r:.60}") for label, name in names.items()}
    return classes, [checked.get(label) for label in classes]


def sorted_if_possible(labels: Iterable[Any]) -> list[Any]:
    """Return labels sorted, or as they are where they cannot be compared."""
    labels = list(labels)
    try:
        return sorted(labels)
    except TypeError:
        return labels


def readable_name(label: str) -> str:
    """Return the name of a class as words: ``PlayMusic``, ``play_music`` and ``play.music`` become ``play music``."""
    return re.sub(r"[\W_]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)).strip().lower() or label


def label_array(labels: list[Any]) -> np.ndarray:
    """Return labels as an array that gives each back as it is: NumPy's own type only where all have the same."""
    if len({type(label) for label in labels}) == 1 and isinstance(labels[0], str | bool | int | float):
        array = np.array(labels)
        # NumPy makes floats of very large integers, and drops null characters from the end of strings
        if [(type(label), label) for label in array.tolist()] == [(type(label), label) for label in labels]:
            return array
    array = np.empty(len(labels), dtype=object)
    for row, label in enumerate(labels):
        array[row] = label
    return array


def label_to_json(label: Any) -> Any:
    """Return a label as JSON holds it.

    Raises:
        AdapterError: if it is no string, number, truth value, or tuple of these.
    """
    if isinstance(label, tuple):
        return {"tuple": [label_to_json(part) for part in label]}
    if isinstance(label, float) and math.isinf(label):
        return {"float": str(label)}
    if type(label) in (str, int, float, bool) and not _is_missing(label):
        return label
    raise AdapterError(
        f"cannot save a classifier whose label {label!r:.60} is a {type(label).__name__}; labels that can be saved are "
        "strings, numbers, truth values, and tuples of these"
    )


def read_labels(stored: Sequence[Any], path: Path) -> list[Any]:
    """Return the labels that :func:`label_to_json` was given.

    Args:
        stored: as JSON holds them.
        path: to name in errors.

    Raises:
        AdapterError: if one is none that it returns, or two are equal.
    """
    labels = [_label_from_json(label, path) for label in stored]
    seen = set()
    for label in labels:
        if label in seen:
            raise AdapterError(f"{path}: the label {label!r:.60} is given twice")
        seen.add(label)
    return labels


def _label_from_json(label: Any, path: Path, depth: int = 0) -> Any:
    match label:
        case {"tuple": list(parts)} if len(label) == 1 and depth < MAX_DEPTH:
            return tuple(_label_from_json(part, path, depth + 1) for part in parts)
        case {"float": "inf" | "-inf" as number} if len(label) == 1:
            return float(number)
        case str() | int() | float():  # and bool, which is an int
            return label
    raise AdapterError(f"{path}: unexpected label {str(label)[:60]}")
