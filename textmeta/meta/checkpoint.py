"""What a run leaves behind and goes on from: its checkpoint and its record; and stopping it at a good moment.

A checkpoint is one safetensors file, its header holding the rest as JSON, replaced atomically.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from textmeta.errors import AdapterError, SettingsError
from textmeta.files import write_atomically

__all__ = ["TrainingState", "open_record", "restore_state", "save_state", "stop_requests"]


@dataclass
class TrainingState:
    """Everything that a step of the outer loop changes."""

    parameters: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    step: int = 0
    bad_steps: int = 0  # the last ones, that no task could be learned from
    best_accuracy: float = -1.0
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)


def save_state(state: TrainingState, path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write a training state as one file, atomically; only a run with the same fingerprint can go on from it."""
    tensors = {f"parameters/{name}": value for name, value in state.parameters.items()}
    tensors |= {f"best/{name}": value for name, value in state.best.items()}
    for index, moments in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{index}/{key}": value for key, value in moments.items() if value is not None}
    numbers = {"step": state.step, "best_accuracy": state.best_accuracy, "best_step": state.best_step}
    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, save(content, metadata={"state": json.dumps({**numbers, "settings": fingerprint})}))


def restore_state(state: TrainingState, path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Read a training state, in place; AdapterError if the file is damaged.

    SettingsError if it belongs to a run with other settings, or of a textmeta with other parameters.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            saved = json.loads(file.metadata()["state"])
            settings = saved["settings"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"cannot read the checkpoint {path}: {error}") from error
    names = {name.removeprefix("parameters/") for name in tensors if name.startswith("parameters/")}
    fault = ""
    if settings != fingerprint:
        fault = f"belongs to a run with other settings ({'; '.join([*_differences(settings, fingerprint)][:5])})"
    elif names != state.parameters.keys():
        odd = min(names ^ state.parameters.keys())
        fault = f"was written by another version of textmeta: {odd} is not a parameter in both"
    if fault:
        raise SettingsError(f"{path} {fault}; give another output folder, or delete this one to start afresh")
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "parameters":
            state.parameters[rest].data.copy_(value)
        elif kind == "best":
            state.best[rest] = value.to(state.parameters[rest].device)
        else:
            index, _, key = rest.partition("/")
            moments.setdefault(int(index), {})[key] = value
    groups = state.optimiser.state_dict()["param_groups"]
    state.optimiser.load_state_dict({"state": moments, "param_groups": groups})
    state.step, state.best_accuracy, state.best_step = saved["step"], saved["best_accuracy"], saved["best_step"]


def _differences(saved: Any, now: Any, where: str = "") -> Iterator[str]:
    """Yield what differs between two nested settings, each with its dotted name."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            yield from _differences(saved.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif saved != now:
        yield f"{where}: {saved!r:.60} there, {now!r:.60} now"


@contextmanager
def open_record(path: Path, step: int, *, enabled: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Open a JSON Lines file, a row a step, and give what appends a row; rows after a step are dropped before.

    Without ``enabled`` nothing is written, as by all processes but one.
    """
    if not enabled:
        yield lambda row: None
        return
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
    with path.open("a", encoding="utf-8", buffering=1) as file:  # a row is on its way when it is written
        yield lambda row: print(json.dumps(dict(row)), file=file)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a request to stop after the step; a second SIGINT acts at once."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set  # signals belong to the main thread
        return

    def request(signum: int, frame: FrameType | None) -> None:
        if requested.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        requested.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
