"""The record of a run: a JSON Lines file with a row a step."""

import json
from collections.abc import Mapping
from pathlib import Path

from textmeta.files import write_atomically

__all__ = ["Record"]


class Record:
    """Appends to a JSON Lines file; rows after the step that a run goes on from are dropped.

    Args:
        path: of the file.
        step: that the run goes on from.
        enabled: False writes nothing, for all processes but one.
    """

    def __init__(self, path: Path, step: int, *, enabled: bool) -> None:
        self._file = None
        if enabled:
            kept = []
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row, which must have a ``step``."""
        if self._file:
            self._file.write(json.dumps(dict(row)) + "\n")
            self._file.flush()
