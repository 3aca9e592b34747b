"""What users give: texts, labels and names, checked, read as words, returned and stored; and settings, checked."""

import difflib
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from textmeta.errors import AdapterError, DataError, SettingsError

Label = str | int | float | bool
LabelNames = Literal["auto"] | Mapping[Any, str] | Sequence[str] | None
HALF = re.compile("[\ud800-\udfff]")  # of a pair of surrogates
PANDAS_MISSING = ("NAType", "NaTType")
MOST = 1e9  # of weights, and their ratios: sums of them are float32 numbers
INFINITE = ({"float": "inf"}, {"float": "-inf"})  # as JSON holds them


def column(given: Any, where: str, what: str) -> Iterator[Any]:
    """Return the values of one column, each when it is asked for: of a list, an array, a series, a generator, a table.

    DataError, by what is given, where, and what the values are, if it is anything else: iterating over a table or a
    mapping would give the names of its columns.
    """
    own, shape = type(given), getattr(given, "shape", None)  # of the type: a series has its rows as attributes, too
    named = [name for name in ("column_names", "columns") if hasattr(own, name)]
    columns = given if isinstance(given, Mapping) else getattr(given, named[0]) if named else ()
    columns = list(columns) if isinstance(columns, Iterable) else []
    fault, kind = "", own.__name__
    if isinstance(given, str | bytes):
        fault = "one string; put it into a list"
    elif isinstance(given, Mapping) or len(columns) > 1:
        fault = f"a {kind} with {len(columns)} columns: {few(columns)}; give one of them"
    elif isinstance(given, Set):
        fault = f"a {kind}, which has no order; give a list"
    elif columns:
        given = given[columns[0]]
    elif isinstance(shape, tuple) and len(shape) == 2 and shape[1] == 1:
        given = given[:, 0]
    elif isinstance(shape, tuple) and len(shape) != 1:
        fault = f"a {kind} of shape {shape}"
    if not fault:
        try:
            return iter(given.to_pylist() if hasattr(own, "to_pylist") else given)  # Arrow's scalars are no strings
        except TypeError:
            fault = f"{kind} {given!r:.60}"
    raise DataError(f"{where}: expected a list, or one column, of {what}, given {fault}")


def checked_texts(
    texts: Any, where: str, *, of: Any = None, allow_empty: bool = False, errors: str = "raise", start: int = 0
) -> list[str]:
    """Return texts, whatever :func:`column` takes, as a list of strings that a tokenizer can read.

    With ``errors="replace"`` the replacement character stands for half of a character (a lone surrogate). DataError if
    a text is missing, no string, empty, or has such a half; it names the row, the first being ``start``, or what ``of``
    lists.
    """
    checked = list(column(texts, where, "texts"))
    for row, text in enumerate(checked):
        fault = ""
        if not isinstance(text, str):
            given = "null" if _is_missing(text) else f"{type(text).__name__} {text!r:.60}"
            fault = f"is {given}, expected a string"
        elif not allow_empty and not text.strip():
            fault = "is empty"
        elif HALF.search(text) and isinstance(errors, str) and errors == "replace":
            checked[row] = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # two halves make one
        elif HALF.search(text):
            fault = f"{text!r:.60} is not valid Unicode: it has half of a character"
        if fault:
            raise DataError(f"{where}{f', row {start + row}' if of is None else f' of {of[row]!r:.60}'}: text {fault}")
    return checked


def checked_labels(labels: Any, where: str = "row") -> list[Any]:
    """Return labels, whatever :func:`column` takes, as Python's own strings, whole numbers, floats and truth values.

    DataError, naming the row, if one is missing or of another type; scalars of NumPy and PyTorch may stand for
    Python's.
    """
    checked = list(column(labels, "labels", "labels"))
    for row, given in enumerate(checked):
        label: Any = given.item() if getattr(given, "ndim", None) == 0 else given
        if type(label) not in (str, int, bool) and _is_missing(label):
            raise DataError(f"{where} {row}: the label is missing ({label})")
        if type(label) not in (str, int, float, bool):
            told = f"of type {type(given).__name__}; labels are strings, whole numbers, floats or truth values"
            raise DataError(f"{where} {row}: label {given!r:.60} is {told}")
        checked[row] = label
    return checked


def checked_weights(weights: Any, count: int) -> list[float]:
    """Return the weights of so many examples as floats; DataError, naming the row, if they cannot be."""
    checked = list(column(weights, "sample_weight", "numbers"))
    if len(checked) != count:
        raise DataError(f"sample_weight: {len(checked)} weights for {count} texts")
    for row, weight in enumerate(checked):
        if not _is_within(weight, 0):
            raise DataError(f"sample_weight, row {row}: expected a finite number from 0, given {weight!r:.60}")
    if count and not any(checked):
        raise DataError("sample_weight: all weights are 0")
    return [float(weight) for weight in checked]


def relative_weights(weights: Sequence[float], where: str) -> list[float] | None:
    """Return weights above 0 as shares of their mean, None where all are 1; DataError if they are too far apart."""
    most = max(weights, default=1.0)
    if most > MOST * min(weights, default=1.0):
        told = f"expected the largest to be at most {MOST:g} times the smallest that is not 0"
        raise DataError(f"{where}, sample_weight: {told}, given {min(weights):g} and {most:g}")
    parts = [weight / most for weight in weights]
    return None if set(parts) <= {1.0} else [part * len(parts) / sum(parts) for part in parts]


def checked_class_weight(given: Any, classes: Sequence[Any]) -> list[float] | None:
    """Return how much an example of each class counts, as scikit-learn has it; None where classes weigh alike.

    Given is "balanced", where they do; None, where each example counts 1; or a mapping from labels to numbers above 0,
    1 where nothing is said. Labels may be of classes to come, or gone; a warning, if a class has no weight then.
    SettingsError or DataError if it is something else, or no label is of a class.
    """
    if isinstance(given, str) and given == "balanced":
        return None
    if given is not None and not isinstance(given, Mapping):
        told = "'balanced', None or a mapping from labels to numbers"
        raise SettingsError(f"class_weight must be {told}, given {given!r:.60}")
    weights = dict(zip(checked_labels(list(given or ()), "class_weight, key"), (given or {}).values(), strict=True))
    for label, weight in weights.items():
        if not _is_within(weight, 1 / MOST, MOST):
            told = f"expected a number from {1 / MOST:g} to {MOST:g}, given {weight!r:.60}"
            raise DataError(f"class_weight of {label!r:.60}: {told}")
    other = [label for label in weights if label not in classes]
    if other and set(classes) - weights.keys():
        nearest = _nearest(other[0], classes)
        told = f"class_weight: {other[0]!r:.60} is no class of this task, the nearest is {nearest!r:.60}"
        if len(other) == len(weights):
            raise DataError(told)
        warnings.warn(told, stacklevel=4)
    return [float(weights.get(label, 1.0)) for label in classes]


def _nearest(label: Any, others: Iterable[Any]) -> Any:
    """Return that of other labels which reads most like one."""
    shown = {str(other): other for other in others}
    return shown[difflib.get_close_matches(str(label), shown, n=1, cutoff=0.0)[0]]


def _is_within(value: Any, least: float, most: float = sys.float_info.max) -> bool:
    """Whether a value is a number in a range, by default of all that a float can be."""
    try:
        return isinstance(value, Real) and least <= float(value) <= most
    except OverflowError:
        return False


def _is_missing(value: object) -> bool:
    """Whether a value says that there is none: None, NaN, or what pandas has for it."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in PANDAS_MISSING


def task_classes(
    labels: Sequence[Any], label_names: LabelNames, where: str = "fit"
) -> tuple[list[Any], list[str] | None]:
    """Return the classes of a task, sorted where they can be, and their names in the same order, or None without.

    Names are, "auto", the labels themselves, if all are words; a mapping, which names every class that has examples,
    and whose further labels are classes too; a list, in the order of the sorted classes; or None. DataError if there
    are fewer than two classes, a class lacks its name or a name is no text, a label is equal to another but of another
    type, or ``label_names`` is something else.
    """
    automatic = isinstance(label_names, str) and label_names == "auto"
    listed = isinstance(label_names, Sequence | np.ndarray) and not isinstance(label_names, str)
    if not (label_names is None or automatic or listed or isinstance(label_names, Mapping)):
        told = "'auto', a mapping from labels to names, a list of names in the order of the sorted labels, or None"
        kind = type(label_names).__name__
        raise DataError(f"{where}: label_names must be {told}, given {kind} {label_names!r:.60}")
    keys = checked_labels(list(label_names), f"{where}, label_names, key") if isinstance(label_names, Mapping) else []
    if not len(labels) and not keys:
        raise DataError(f"{where} without examples needs label_names: a mapping from at least 2 labels to their names")
    found: dict[Any, Any] = {}
    for place, given in (("row", labels), ("label_names, key", keys)):
        for row, label in enumerate(given):
            if type(found.setdefault(label, label)) is not type(label):  # 1 equals 1.0 and True
                told = f"equals {found[label]!r} but is of another type; a class needs one label"
                raise DataError(f"{where}, {place} {row}: label {label!r} {told}")
    try:
        classes = sorted(found)
    except TypeError:
        classes = list(found)
    if isinstance(label_names, Mapping):
        named, present = dict(zip(keys, label_names.values(), strict=True)), dict.fromkeys(labels)
        # a key that was misspelt would become a class
        if left_out := [label for label in present if label not in named]:
            told = f"{where}: label {left_out[0]!r:.60} has no name in label_names"
            if alone := [key for key in named if key not in present]:
                told += f", which names {len(alone)} without examples, the nearest {_nearest(left_out[0], alone)!r:.60}"
            raise DataError(f"{told}; expected a name for every class: {few(left_out)} left out")
        names: list[Any] | None = [named[label] for label in classes]
    elif automatic:
        names = [readable_name(label) for label in classes] if all(map(is_word, classes)) else None
    else:
        names = None if label_names is None else list(label_names)
    if len(classes) < 2:
        told = "classes without examples can be given as label_names, a mapping from labels to names"
        raise DataError(f"{where} needs at least 2 classes, found {len(classes)}: {classes}; {told}")
    if names is not None and len(names) != len(classes):
        raise DataError(f"{where}: label_names has {len(names)} names for {len(classes)} classes: {few(classes)}")
    return classes, None if names is None else checked_texts(names, f"{where}, label_names", of=classes)


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return a setting; SettingsError if it is none of its choices, whatever it is instead."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise SettingsError(f"{name} must be one of {few(choices)}, given {value!r:.60}")
    return value


def number(name: str, value: Any, least: float, most: float = sys.float_info.max) -> float:
    """Return a setting; SettingsError if it is no number in a range."""
    if not _is_within(value, least, most):
        to = f" to {most}" if most < sys.float_info.max else ""
        raise SettingsError(f"{name} must be a number from {least}{to}, given {value!r:.60}")
    return value  # type: ignore[no-any-return]


def whole_number(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Return a setting as an int; SettingsError if it is no whole number in a range."""
    own = value.item() if getattr(value, "ndim", None) == 0 else value  # of NumPy or PyTorch
    if type(own) is not int or not least <= own <= most:
        to = f" to {most}" if most < math.inf else ""
        raise SettingsError(f"{name} must be a whole number from {least}{to}, given {value!r:.60}")
    return own


def few(labels: Sequence[Any], limit: int = 8) -> str:
    """Return the first labels as a message lists them."""
    return ", ".join(f"{label!r:.60}" for label in labels[:limit]) + (", …" if len(labels) > limit else "")


def is_word(label: object) -> bool:
    """Whether a label can be read as the name of its class: a string with a letter in it."""
    return isinstance(label, str) and any(map(str.isalpha, label))


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
    """Return a label as JSON holds it, which has no infinity."""
    return {"float": str(label)} if isinstance(label, float) and math.isinf(label) else label


def label_from_json(stored: Any) -> Any:
    """Return the label that :func:`label_to_json` was given; anything else as it is."""
    return float(stored["float"]) if stored in INFINITE else stored


def read_labels(stored: Sequence[Any], path: Path) -> list[Any]:
    """Return the labels that :func:`label_to_json` was given; AdapterError if one is none, or equal to another."""
    labels = list(map(label_from_json, stored))
    seen = set()
    for label in labels:
        if not isinstance(label, str | int | float) or label in seen:
            raise AdapterError(f"{path}: the label {str(label)[:60]!r} is none, or is given twice")
        seen.add(label)
    return labels


def plain(value: Any) -> str:
    """Return a value that may be anybody's as text of one line, without what terminals or Markdown act on."""
    text = "a very large number" if isinstance(value, int) and abs(value) >= 2**63 else str(value)
    return "".join(c if c.isprintable() and c not in "`|<>" else "\N{REPLACEMENT CHARACTER}" for c in text)[:500]
