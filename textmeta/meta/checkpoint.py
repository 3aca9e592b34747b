"""What a run leaves behind and goes on from: its checkpoint and its record; and stopping it at a good moment.

A checkpoint is one safetensors file, its header holding the rest as JSON, replaced atomically. The one before is kept.
"""

import json
import signal
import threading
import warnings
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

from textmeta.encoder.pretrained import tensors_digest
from textmeta.errors import AdapterError, SettingsError
from textmeta.files import write_atomically

BEFORE = "checkpoint.before"
NUMBERS = ("step", "best_accuracy", "best_step", "without_gain")  # of a training state


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
    last_gain: Tensor | None = None  # (E,) validation accuracy of each episode when there last was a gain
    without_gain: int = 0  # validations since
    damaged: Path | None = None  # checkpoint that could not be read


def save_state(state: TrainingState, path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write a training state as one file, atomically; only a run with the same fingerprint can go on from it."""
    tensors = {f"parameters/{name}": value for name, value in state.parameters.items()}
    tensors |= {f"best/{name}": value for name, value in state.best.items()}
    for index, moments in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{index}/{key}": value for key, value in moments.items() if value is not None}
    if state.last_gain is not None:
        tensors["last_gain"] = state.last_gain
    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    told = {name: getattr(state, name) for name in NUMBERS}
    told |= {"settings": fingerprint, "sha256": tensors_digest(content)}
    if state.damaged:  # set aside, lest it become the one before
        state.damaged.replace(path.with_suffix(".damaged"))
        state.damaged = None
    write_atomically(path, save(content, metadata={"state": json.dumps(told)}), path.with_stem(BEFORE))


def restore_state(state: TrainingState, path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Read a training state, in place, if there is one: where the newest file is damaged, that before, with a warning.

    AdapterError if there are damaged ones alone; SettingsError if it belongs to a run with other settings, or of a
    textmeta with other parameters.
    """
    there = [each for each in (path, path.with_stem(BEFORE)) if each.exists()]
    for each in there:
        try:
            tensors, saved = _read(each)
            break
        except AdapterError as error:
            if each == there[-1]:
                raise
            state.damaged = path
            warnings.warn(f"{error}; the run goes on from {there[-1]}, the one before", stacklevel=2)
    else:
        return
    names = {name.removeprefix("parameters/") for name in tensors if name.startswith("parameters/")}
    fault = ""
    if saved["settings"] != fingerprint:
        differences = "; ".join([*_differences(saved["settings"], fingerprint)][:5])
        fault = f"belongs to a run with other settings ({differences})"
    elif names != state.parameters.keys():
        odd = min(names ^ state.parameters.keys())
        fault = f"was written by another version of textmeta: {odd} is not a parameter in both"
    if fault:
        raise SettingsError(f"{each} {fault}; give another output folder, or delete this one to start afresh")
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "parameters":
            state.parameters[rest].data.copy_(value)
        elif kind == "best":
            state.best[rest] = value.to(state.parameters[rest].device)
        elif kind == "last_gain":
            state.last_gain = value
        else:
            index, _, key = rest.partition("/")
            moments.setdefault(int(index), {})[key] = value
    groups = state.optimiser.state_dict()["param_groups"]
    state.optimiser.load_state_dict({"state": moments, "param_groups": groups})
    vars(state).update({name: saved[name] for name in NUMBERS})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a checkpoint, and what its header says; AdapterError if damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            told = json.loads(file.metadata()["state"])
        saved = {name: told[name] for name in ("settings", "sha256", *NUMBERS)}
        if saved["sha256"] != tensors_digest(tensors):
            raise ValueError("its tensors are not those that were written")
    except KeyError as error:
        raise AdapterError(f"{path} was written by another version of textmeta: it has no {error}") from error
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise AdapterError(f"cannot read the checkpoint {path}: {error}") from error
    return tensors, saved


def _differences(saved: Any, now: Any, where: str = "") -> Iterator[str]:
    """Yield what differs between two nested settings, each with its dotted name."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            yield from _differences(saved.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif saved != now:
        yield f"{where}: {saved!r:.60} there, {now!r:.60} now"


def rows_of(record: Path) -> list[dict[str, Any]]:
    """Return the rows of a record, if there is one, without a last one that was cut short."""
    whole = record.read_text(encoding="utf-8").rpartition("\n")[0] if record.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


@contextmanager
def open_record(path: Path, step: int, *, enabled: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Open a JSON Lines file, a row a step, and give what appends a row; rows after a step are dropped before.

    Without ``enabled`` nothing is written, as by all processes but one.
    """
    if not enabled:
        yield lambda row: None
        return
    kept = [row for row in rows_of(path) if row["step"] <= step]
    write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in kept).encode())
    with path.open("a", encoding="utf-8", buffering=1) as file:  # a row is on its way when it is written
        yield lambda row: print(json.dumps(dict(row)), file=file)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Turn SIGINT and SIGTERM into a request to stop after the step, its number; a second SIGINT acts at once."""
    requested = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # signals belong to the main thread
        return

    def request(signum: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        requested = requested or signum

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
