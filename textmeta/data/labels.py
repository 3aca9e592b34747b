"""Texts, labels and names as users give them: checked, read as words, returned and stored."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from textmeta.errors import AdapterError, DataError

__all__ = [
    "Label",
    "LabelNames",
    "checked_labels",
    "checked_text",
    "checked_texts",
    "label_array",
    "label_to_json",
    "plain",
    "read_labels",
    "readable_name",
    "sorted_if_possible",
    "task_classes",
]

Label = str | int | float | bool
LabelNames = Literal["auto"] | Mapping[Any, str] | Sequence[str] | None


def checked_texts(texts: Iterable[object], where: str, *, allow_empty: bool = False) -> list[str]:
    """Return texts as a list of strings that a tokenizer can read.

    Args:
        texts: to check.
        where: what the message calls them.
        allow_empty: whether a text may be empty or white space.

    Raises:
        DataError: naming the row, if a text is null, no string, empty, or has half of a character (a lone surrogate).
    """
    if isinstance(texts, str):
        raise DataError(f"{where}: expected a list of texts, given one string; put it into a list")
    return [checked_text(text, f"{where}, row {row}", allow_empty=allow_empty) for row, text in enumerate(texts)]


def checked_text(text: object, where: str, *, allow_empty: bool = False) -> str:
    """Return a text that a tokenizer can read; arguments and errors as for :func:`checked_texts`."""
    if not isinstance(text, str):
        given = "null" if text is None else f"{type(text).__name__} {text!r:.60}"
        raise DataError(f"{where}: text is {given}, expected a string")
    if not allow_empty and not text.strip():
        raise DataError(f"{where}: text is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: text {text!r:.60} is not valid Unicode: {error.reason}") from error
    return text


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
        label: Any = given.item() if getattr(given, "ndim", None) == 0 else given  # type: ignore[union-attr]
        if label is None or (type(label) is float and math.isnan(label)):
            raise DataError(f"{where} {row}: the label is missing ({label})")
        if type(label) not in (str, int, float, bool):
            raise DataError(
                f"{where} {row}: label {given!r:.60} is of type {type(given).__name__}; labels are strings, whole "
                "numbers, floats or truth values"
            )
        checked.append(label)
    return checked


def task_classes(labels: Sequence[Any], label_names: LabelNames) -> tuple[list[Any], list[str] | None]:
    """Return the classes of a task, sorted where they can be, and their names in the same order, or None without.

    Args:
        labels: of the examples, checked.
        label_names: what the classes are called in words.

            * ``"auto"`` reads the labels themselves, if all of them are strings with a letter in them; else none.
            * A mapping from labels to names names every class that has examples. Its further labels are classes too,
              known by their names alone.
            * A list has the names in the order of the sorted classes.
            * None reads nothing.

    Raises:
        DataError: if there are fewer than two classes, a class lacks its name or a name is no text, a label is equal to
            another but of another type, or ``label_names`` is something else.
    """
    automatic = isinstance(label_names, str) and label_names == "auto"
    listed = isinstance(label_names, Sequence | np.ndarray) and not isinstance(label_names, str)
    if not (label_names is None or automatic or listed or isinstance(label_names, Mapping)):
        raise DataError(
            "fit: label_names must be 'auto', a mapping from labels to names, a list of names in the order of the "
            f"sorted labels, or None, given {type(label_names).__name__} {label_names!r:.60}"
        )
    keys = checked_labels(label_names, "fit, label_names, key") if isinstance(label_names, Mapping) else []
    if not len(labels) and not keys:
        raise DataError("fit without examples needs label_names: a mapping from at least 2 labels to their names")
    classes = sorted_if_possible(dict.fromkeys([*labels, *keys]))
    _check_one_type_each(classes, {"row": labels, "label_names, key": keys})
    if isinstance(label_names, Mapping):
        _check_all_named(dict.fromkeys(labels), keys)
    if len(classes) < 2:
        raise DataError(
            f"fit needs at least 2 classes, found {len(classes)}: {classes}; classes without examples can be given as "
            "label_names, a mapping from labels to names"
        )
    if isinstance(label_names, Mapping):
        named = dict(zip(keys, label_names.values(), strict=True))
        names: list[str] | None = [named[label] for label in classes]
    elif automatic:
        words = all(isinstance(label, str) and any(map(str.isalpha, label)) for label in classes)
        names = [readable_name(label) for label in classes] if words else None
    else:
        names = None if label_names is None else list(label_names)
    if names is None:
        return classes, None
    if len(names) != len(classes):
        raise DataError(f"fit: label_names has {len(names)} names for {len(classes)} classes: {_few(classes)}")
    pairs = zip(names, classes, strict=True)
    return classes, [checked_text(name, f"fit, label_names of {label!r:.60}") for name, label in pairs]


def _check_one_type_each(classes: Sequence[Any], given: Mapping[str, Sequence[Any]]) -> None:
    """Refuse 1 beside 1.0 or True: they are equal, so that they would be one class."""
    same = {label: label for label in classes}
    for place, labels in given.items():
        for row, label in enumerate(labels):
            if type(same[label]) is not type(label):
                raise DataError(
                    f"fit, {place} {row}: label {label!r} equals {same[label]!r} but is of another type; a class needs "
                    "one label"
                )


def _check_all_named(labels: Mapping[Any, None], keys: Sequence[Any]) -> None:
    """Refuse a mapping that leaves out a class with examples: a key that was misspelt would become a class."""
    alone = [key for key in keys if key not in labels]
    left_out = [label for label in labels if label not in set(keys)]
    if not left_out:
        return
    if not alone:
        raise DataError(f"fit: label_names leaves out {_few(left_out)}; expected a name for every class")
    first = left_out[0]
    near = difflib.get_close_matches(str(first), map(str, alone), n=1, cutoff=0.0)[0]
    key = next(key for key in alone if str(key) == near)
    raise DataError(
        f"fit: label {first!r:.60} has no name in label_names, which names {len(alone)} without examples, the nearest "
        f"{key!r:.60}; expected a name for every class: {_few(left_out)} left out"
    )


def _few(labels: Sequence[Any], limit: int = 8) -> str:
    return ", ".join(f"{label!r:.60}" for label in labels[:limit]) + (", …" if len(labels) > limit else "")


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
    if len({type(label) for label in labels}) == 1:
        array = np.array(labels)
        # NumPy makes floats of very large integers, and drops null characters from the end of strings
        if [(type(label), label) for label in array.tolist()] == [(type(label), label) for label in labels]:
            return array
    array = np.empty(len(labels), dtype=object)
    array[:] = labels
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


def plain(value: Any) -> str:
    """Return a value that may be anybody's as text of one line, without what terminals or Markdown act on."""
    text = "a very large number" if isinstance(value, int) and abs(value) >= 2**63 else str(value)
    return "".join(c if c.isprintable() and c not in "`|<>" else "\N{REPLACEMENT CHARACTER}" for c in text)[:500]
