"""Labels (strings, numbers, truth values), as a classifier is given them, returns them and stores them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from textmeta.data.texts import checked_text
from textmeta.errors import AdapterError, DataError

__all__ = [
    "Label",
    "LabelNames",
    "checked_labels",
    "label_array",
    "label_to_json",
    "read_labels",
    "readable_name",
    "sorted_if_possible",
    "task_classes",
]

Label = str | int | float | bool
LabelNames = Mapping[Any, str] | Literal["labels"] | None


def checked_labels(labels: Iterable[Label], where: str = "row") -> list[Any]:
    """Return labels as Python's own strings, whole numbers, floats and truth values.

    Args:
        labels: to check; scalars of NumPy and PyTorch may stand for Python's.
        where: what the message calls the place of one, before its number.

    Raises:
        DataError: naming the row, if one is missing or of another type.
    """
    if isinstance(labels, str):
        raise DataError("expected a list of labels, given one string; put it into a list")
    checked: list[Any] = []
    for row, given in enumerate(labels):
        scalar = isinstance(given, np.generic) or (isinstance(given, Tensor) and given.ndim == 0)
        label: Any = given.item() if scalar else given  # type: ignore[union-attr]
        if label is None or (type(label) is float and math.isnan(label)):
            raise DataError(f"{where} {row}: the label is missing ({label})")
        if type(label) not in (str, int, float, bool):
            raise DataError(
                f"{where} {row}: label {given!r:.60} is of type {type(given).__name__}; labels are strings, whole "
                "numbers, floats or truth values"
            )
        checked.append(label)
    return checked


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


def label_to_json(label: Label) -> Any:
    """Return a label as JSON holds it."""
    return {"float": str(label)} if isinstance(label, float) and math.isinf(label) else label


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


def _label_from_json(label: Any, path: Path) -> Label:
    match label:
        case {"float": "inf" | "-inf" as number} if len(label) == 1:
            return float(number)
        case str() | int() | float():  # and bool, which is an int
            return label
    raise AdapterError(f"{path}: unexpected label {str(label)[:60]}")
