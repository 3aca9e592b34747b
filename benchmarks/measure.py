"""What the benchmarks share: timing sides in turn, reading memory, printing a table."""

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

__all__ = ["alternate", "markdown", "print_table", "resident", "settle"]


def alternate(sides: dict[str, Callable[[], object]], repeats: int, label: str) -> dict[str, list[float]]:
    """Return the seconds of each side, timed in turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in tqdm(range(1 + repeats), desc=label, unit="turn", leave=False):
        for name, run in sides.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def settle(model: torch.nn.Module) -> None:
    """Load weights that are only mapped from their file yet, and give back what the heap holds free."""
    for parameter in model.parameters():
        parameter.sum()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(kind: str) -> int:
    """Return VmRSS or VmHWM, the resident memory now or at its peak, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table, its head first."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(markdown(rows))
