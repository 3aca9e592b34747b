"""The bar of long work: on a terminal it moves, elsewhere, as in the log of a job, it is a plain line now and then."""

import os
import sys
from collections.abc import Iterable
from io import TextIOBase
from typing import Any, TextIO

from tqdm import tqdm

BAR_AFTER = 5.0  # seconds that brief work may take without a bar
LINE_EVERY = 30.0  # seconds


class _Lines(TextIOBase):
    """What a bar is written to where there is no terminal: moves of the cursor are left out."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> int:
        if line := text.replace("\x1b[A", "").strip():
            print(line, file=self._file, flush=True)
        return len(text)


def is_first_process() -> bool:
    """Whether this is the one that speaks for all, of several processes that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(
    total: int | None,
    label: str | None,
    unit: str,
    *,
    over: Iterable[Any] | None = None,
    initial: int = 0,
    brief: bool = False,
) -> tqdm:
    """Return a tqdm of ``total`` units, with rate and remaining time; without a label it shows nothing.

    Of several processes the first shows it. One that is ``brief`` shows after some seconds, and is gone at its end.
    """
    disable = label is None or not is_first_process()
    how: dict[str, Any] = {"leave": not brief, "delay": BAR_AFTER * brief, "disable": disable}
    if not (sys.stderr and sys.stderr.isatty()) and "ipykernel" not in sys.modules:  # which can show a bar, too
        how |= {"file": _Lines(sys.stderr), "ncols": 0, "mininterval": LINE_EVERY, "maxinterval": LINE_EVERY}
    return tqdm(over, label, total, unit=unit, initial=initial, **how)
