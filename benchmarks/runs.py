"""Runs of a resumable benchmark: each one that is finished is a line of its results file, and is not repeated."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from textmeta.files import write_atomically

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run that is worth a line in the results."""

    key: dict[str, Any]  # all that its result depends on; "first" and "episodes" say which episodes it is of
    work: Callable[[], dict[str, Any]]  # does it, and returns what came out


def made_with(*libraries: str) -> dict[str, Any]:
    """Return what a line says of today and of the versions of libraries."""
    return {"date": datetime.now(UTC).date().isoformat(), "versions": {name: version(name) for name in libraries}}


def do_missing(runs: Iterable[Run], lines: list[Line], path: Path, told: Mapping[str, Any] | None = None) -> None:
    """Do the runs that no line of a file covers yet, adding one for each, with what else is told, to both at once.

    A last line of the file that a crash cut short goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.read_bytes() if path.exists() else b""
    if written and not written.endswith(b"\n"):
        write_atomically(path, written[: written.rfind(b"\n") + 1])
    for run in tqdm(missing(runs, lines), desc="runs", unit="run"):
        tqdm.write(" ".join(f"{value}" for value in run.key.values()))
        start = time.monotonic()
        with torch.random.fork_rng(devices=[]):
            result = run.work()
        line = {"key": run.key, "seconds": round(time.monotonic() - start), **(told or {}), "result": result}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        lines.append(line)


def missing(runs: Iterable[Run], lines: Sequence[Line]) -> list[Run]:
    """Return the runs whose episodes are in no line: one of many episodes stands for shorter ones."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for line in lines:
        other, span = _span(line["key"])
        found[other].append(span)

    def is_covered(run: Run) -> bool:
        other, (first, end) = _span(run.key)
        return any(start <= first and end <= last for start, last in found[other])

    return [run for run in runs if not is_covered(run)]


def _span(key: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    """Return what a key says but for its episodes, and the first of these and the one after the last."""
    other = {name: value for name, value in key.items() if name not in ("first", "episodes")}
    first = key.get("first", 0)
    return json.dumps(other, sort_keys=True), (first, first + key.get("episodes", 0))


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a results file, without a last one that is cut short, by a crash or while being written."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]
