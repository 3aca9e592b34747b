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

__all__ = ["Record", "TrainingState", "restore_state", "save_state", "stop_requests"]


@dataclass
class TrainingState:
    """Everything that a step of the outer loop changes."""

    parameters: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    step: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)


def save_state(state: TrainingState, path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write a training state as one file, atomically.

    Args:
        state: to write.
        path: of the file.
        fingerprint: settings of the run, JSON-able; only a run with the same ones can go on from the file.
    """
    tensors = {f"parameters/{name}": value for name, value in state.parameters.items()}
    tensors |= {f"best/{name}": value for name, value in state.best.items()}
    for index, moments in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{index}/{key}": value for key, value in moments.items() if value is not None}
    numbers = {"step": state.step, "best_accuracy": state.best_accuracy, "best_step": state.best_step}
    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, save(content, metadata={"state": json.dumps({**numbers, "settings": fingerprint})}))


def restore_state(state: TrainingState, path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Read a training state, in place.

    Raises:
        SettingsError: if the file belongs to a run with other settings, or of a textmeta with other parameters.
        AdapterError: if it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            saved = json.loads(file.metadata()["state"])
            settings = saved["settings"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"cannot read the checkpoint {path}: {error}") from error
    if settings != fingerprint:
        differing = list(_differences(settings, fingerprint))
        raise SettingsError(
            f"{path} belongs to a run with other settings ({'; '.join(differing[:5])}); give another output folder, "
            "or delete this one to start afresh"
        )
    names = {name.removeprefix("parameters/") for name in tensors if name.startswith("parameters/")}
    if names != state.parameters.keys():
        raise SettingsError(
            f"{path} was written by another version of textmeta: {sorted(names ^ state.parameters.keys())[0]} is not a "
            "parameter in both; give another output folder, or delete this one to start afresh"
        )
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


class Record:
    """Appends to a JSON Lines file, a row a step; rows after the step that a run goes on from are dropped.

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
