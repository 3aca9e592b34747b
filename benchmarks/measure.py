"""What the benchmarks share: timing sides in turn, reading memory, naming the device, printing a table."""

import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import Parameters

__all__ = ["alternate", "device_name", "distance", "print_table", "resident", "settle", "synchronise", "timed"]


def alternate(
    sides: dict[str, Callable[[], object]], repeats: int, encoder: Encoder, label: str
) -> dict[str, list[float]]:
    """Time each side in turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in tqdm(range(1 + repeats), desc=label, unit="turn", leave=False):
        for name, run in sides.items():
            seconds = timed(run, encoder)
            if turn:
                times[name].append(seconds)
    return times


def timed(run: Callable[[], object], encoder: Encoder) -> float:
    """Return the seconds that a call takes."""
    synchronise(encoder)
    start = time.perf_counter()
    run()
    synchronise(encoder)
    return time.perf_counter() - start


def synchronise(encoder: Encoder) -> None:
    """Wait for a GPU."""
    if encoder.device.type == "cuda":
        torch.cuda.synchronize()


def distance(one: Parameters, two: Parameters) -> float:
    """Return the norm of the difference of two gradients over the norm of the second."""
    flat = [torch.cat([part[name].flatten() for name in sorted(one)]) for part in (one, two)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def settle(model: torch.nn.Module) -> None:
    """Load weights that are only mapped from their file yet, and give back what the heap holds free."""
    for parameter in model.parameters():
        parameter.sum()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(kind: str) -> int:
    """Return VmRSS or VmHWM, the resident memory now or at its peak, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))


def device_name(encoder: Encoder) -> str:
    """Return what the engine runs on."""
    if encoder.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")
