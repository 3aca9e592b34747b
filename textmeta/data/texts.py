"""Texts, alone or with labels: lines, CSV or JSON Lines, read a row at a time, so that there may be any number."""

import csv
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from textmeta.data.labels import HALF, few
from textmeta.errors import DataError
from textmeta.files import at_home

ENDINGS = {".json": "jsonl", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv"}

Rows = Iterator[dict[str, Any]]


def text_format(name: str) -> str:
    """Return the format of texts that a file's ending stands for: "csv", "jsonl", or else "lines"."""
    return ENDINGS.get(Path(name).suffix.lower(), "lines")


@contextmanager
def open_texts(
    name: str, form: str | None = None, column: str = "text", label_column: str | None = None
) -> Iterator[tuple[list[str], Rows]]:
    """Open a file of texts; give its columns, and an iterator of its rows, each a mapping from columns to values.

    "-" is standard input. The form is "csv", "jsonl" (objects, or one list of them) or "lines", by default as the
    ending says; lines have no column but that of the texts, JSON Lines any others. DataError, naming the line, if it is
    not UTF-8, or lacks a text or the column of the labels, where that is asked for.
    """
    form = form or text_format(name)
    newline = "" if form == "csv" else "\n"
    how: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    if name == "-":
        sys.stdin.reconfigure(**how)  # type: ignore[union-attr]
    with nullcontext(sys.stdin) if name == "-" else open(at_home(name), **how) as file:
        place, columns = [name], [column]
        needed = {column} if label_column is None else {column, label_column}
        lines = _lines(file, name, place)
        rows: Iterable[Any] = ({column: line.rstrip("\r\n")} for line in lines)
        if form == "jsonl":
            rows = _objects(lines)
        elif form == "csv":
            first = next(lines, "")
            try:
                between = separator(first, needed, tabs=name.lower().endswith(".tsv"))
                rows = csv.DictReader(itertools.chain([first], lines), delimiter=between, strict=True)
                columns = list(rows.fieldnames or ())
            except csv.Error as error:
                raise DataError(f"{place[0]}: {error}") from error
            twice = len(set(columns)) < len(columns) if label_column is None else columns.count(label_column) > 1
            if columns.count(column) != 1 or twice:
                raise DataError(f"{name}: expected a column {column!r}, and none twice; its columns are {few(columns)}")
        yield columns, _checked(rows, place, column, needed)


def _lines(file: Iterable[str], name: str, place: list[str]) -> Iterator[str]:
    """Yield the lines of a file; the place of the last is kept."""
    for number, line in enumerate(file, 1):
        place[0] = f"{name}, line {number}"
        if HALF.search(line):  # what stands for a byte that was no character
            raise DataError(f"{place[0]}: expected lines, CSV or JSON Lines in UTF-8, given {line!r:.60}")
        yield line


def _objects(lines: Iterator[str]) -> Iterator[Any]:
    """Yield the values of JSON Lines, or of one list of JSON."""
    first = next(lines, "")
    if first.lstrip().startswith("["):
        yield from DECODER.decode(first + "".join(lines))
    else:
        yield from (DECODER.decode(line) for line in itertools.chain([first], lines) if line.strip())


def _finite(number: str) -> float:
    if not math.isfinite(found := float(number)):
        raise ValueError(f"{number} is no number of JSON")
    return found


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _checked(rows: Iterable[Any], place: list[str], column: str, needed: set[str]) -> Rows:
    try:
        for row in rows:
            if isinstance(row, dict) and (missing := needed - row.keys()):
                raise ValueError(f"no column {min(missing)!r}; its columns are {few([*row])}")
            if not isinstance(row, dict) or not isinstance(row.get(column), str) or None in row:  # None: further cells
                raise ValueError(f"expected a string as {column!r}, and no more cells than columns, given {row!r:.80}")
            yield row
    except DataError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{place[0]}: {error}") from error


def separator(first: str, columns: set[str], *, tabs: bool) -> str:
    """Return what stands between the cells of a first row: that which has the columns, or makes most cells."""
    separators: tuple[str, ...] = (*("\t," if tabs else ",\t"), ";", "|")
    rows = {separator: next(csv.reader([first], delimiter=separator), []) for separator in separators}
    return max(separators, key=lambda separator: (columns <= set(rows[separator]), len(rows[separator])))
