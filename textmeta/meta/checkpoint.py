"""Checkpoints of the outer loop: one safetensors file, its header holding the rest as JSON, replaced atomically."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from textmeta.errors import AdapterError, SettingsError
from textmeta.files import write_atomically
from textmeta.model.initialisation import Parameters

__all__ = ["TrainingState", "differences", "restore_state", "save_state"]


@dataclass
class TrainingState:
    """Everything that a step of the outer loop changes."""

    parameters: Parameters
    optimiser: torch.optim.Optimizer
    step: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    best: Parameters = field(default_factory=dict)


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
        differing = list(differences(settings, fingerprint))
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


def differences(saved: Any, now: Any, where: str = "") -> Iterator[str]:
    """Yield what differs between two nested settings, each with its dotted name."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            yield from differences(saved.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif saved != now:
        yield f"{where}: {saved!r:.60} there, {now!r:.60} now"
