"""Runs of a resumable benchmark: each one that is finished is a line of its results file, and is not repeated."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from textmeta.files import write_atomically

__all__ = ["Line", "Run", "do_missing", "read_lines"]

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run that is worth a line in the results.

    Args:
        key: what it is known by: all that its result depends on.
        work: does it, and returns what came out.
    """

    key: dict[str, Any]
    work: Callable[[], dict[str, Any]]


def do_missing(runs: Iterable[Run], lines: list[Line], path: Path, told: Mapping[str, Any] | None = None) -> None:
    """Do the runs that have no line yet, adding one for each to the lines and, at once, to the file.

    Args:
        runs: to be done.
        lines: of the file.
        path: of the file.
        told: what else a line says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [line["key"] for line in lines]
    for run in tqdm([run for run in runs if run.key not in done], desc="runs", unit="run"):
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


def read_lines(path: Path, *, mend: bool = True) -> list[Line]:
    """Return the lines of a results file, without a last one that a crash cut short.

    Args:
        path: of the file.
        mend: whether to take the cut line off the file; not, where another process may be writing it.
    """
    if not path.exists():
        return []
    whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
    if torn and mend:
        write_atomically(path, (whole + "\n" * bool(whole)).encode())
    return [json.loads(line) for line in whole.splitlines()]
