"""A fitted classifier as two files beside the adapter: its tensors in safetensors, labels and examples in JSON."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from textmeta.artifact.adapter import HEAD, Adapter, FittedHead
from textmeta.artifact.index_files import UNIT_TOLERANCE
from textmeta.artifact.parsing import check_members, finite_tensors, member, read_json, read_tensors, write_json
from textmeta.data.labels import label_to_json, read_labels
from textmeta.errors import AdapterError
from textmeta.model.initialisation import LORA, SCOPE, lora_factors
from textmeta.model.scope import TEXT_INPUTS
from textmeta.tasks import TaskEmbedding

__all__ = ["CLASSES", "FITTED_FILES", "fitted_files", "read_fitted"]

CLASSES = "classifier.json"
FITTED_FILES = frozenset({HEAD, CLASSES})
WEIGHTS = "weights"  # (C, d)
TEMPERATURE = "temperature"  # ()
TASK_VECTOR, TASK_CLASSES = "task_vector", "task_classes"  # (e,) and (C, d), of length 1


def fitted_files(fitted: FittedHead) -> dict[str, bytes]:
    """Return the files of a fitted classifier: name to content.

    Raises:
        AdapterError: if a value is not finite.
    """
    head = {LORA + name: value for name, value in fitted.factors.items()}
    head |= {WEIGHTS: fitted.weights, TEMPERATURE: fitted.temperature}
    if fitted.scope is not None:
        head[SCOPE] = fitted.scope
    if fitted.task is not None:
        head |= {
            TASK_VECTOR: torch.from_numpy(fitted.task.vector),
            TASK_CLASSES: torch.from_numpy(fitted.task.classes),
        }
    labels = [label_to_json(label) for label in fitted.classes]
    return {
        HEAD: save_tensors(finite_tensors(head)),
        CLASSES: write_json({"classes": labels, "support": fitted.support}),
    }


def read_fitted(files: Mapping[str, bytes], folder: Path, adapter: Adapter) -> FittedHead | None:
    """Return the fitted classifier that an adapter folder holds; None, if it has none.

    Args:
        files: of the folder, name to content.
        folder: to name in errors.
        adapter: that the folder holds.

    Raises:
        AdapterError: if one of its two files is missing, a value is not what it must be, or it is no classifier of this
            adapter.
    """
    if not files.keys() & FITTED_FILES:
        return None
    for name in (HEAD, CLASSES):
        if name not in files:
            raise AdapterError(f"{folder} is no whole fitted classifier: it has no {name}")
    tensors = read_tensors(files[HEAD], folder / HEAD)
    weights = tensors.pop(WEIGHTS, torch.empty(0))
    content = read_json(files[CLASSES], folder / CLASSES)
    check_members(content, ("classes", "support"), folder / CLASSES)
    classes = read_labels(member(content, "classes", list, folder / CLASSES), folder / CLASSES)
    if weights.ndim != 2 or len(weights) != len(classes) or len(classes) < 2:
        raise AdapterError(
            f"{folder / HEAD}: weights have shape {tuple(weights.shape)}, but {CLASSES} lists {len(classes)} classes; "
            "expected a row for each of at least 2"
        )
    temperature, task = _pop_temperature(tensors, folder / HEAD), _pop_task(tensors, classes, adapter, folder / HEAD)
    scope = _pop_scope(tensors, adapter, folder / HEAD)
    factors = lora_factors(adapter.parameters)
    if {n: v.shape for n, v in tensors.items()} != {LORA + n: v.shape for n, v in factors.items()}:
        raise AdapterError(f"{folder / HEAD} does not hold the adapter's LoRA factors")
    fitted = FittedHead(lora_factors(tensors), weights, classes, temperature=temperature, task=task, scope=scope)
    return replace(fitted, support=_read_support(content, len(classes), folder / CLASSES))


def _read_support(content: Mapping[str, Any], ways: int, path: Path) -> list[tuple[str, int]] | None:
    if content.get("support") is None:
        return None
    rows = member(content, "support", list, path)
    for row, example in enumerate(rows):
        match example:
            case [str(), int(label)] if type(label) is int and 0 <= label < ways:
                continue
        raise AdapterError(f"{path}, support {row}: expected a text and a class, found {example!r:.60}")
    return [(text, label) for text, label in rows]


def _pop_temperature(tensors: dict[str, Tensor], path: Path) -> Tensor:
    """Take a fitted head's temperature out of its tensors."""
    value = tensors.pop(TEMPERATURE, torch.empty(0))
    if value.shape != () or not value > 0:
        raise AdapterError(f"{path}: {TEMPERATURE} must be one positive number, found {value!s:.60}")
    return value


def _pop_scope(tensors: dict[str, Tensor], adapter: Adapter, path: Path) -> Tensor | None:
    """Take a fitted task's rule for what is out of scope out of its tensors; None, where the adapter has none."""
    if SCOPE not in adapter.parameters:
        return None  # what is there all the same is no LoRA factor, and refused as that
    value = tensors.pop(SCOPE, torch.empty(0))
    if value.shape != (len(TEXT_INPUTS) + 1,):
        raise AdapterError(f"{path}: {SCOPE} has shape {tuple(value.shape)}, expected ({len(TEXT_INPUTS) + 1},)")
    return value


def _pop_task(tensors: dict[str, Tensor], classes: list[Any], adapter: Adapter, path: Path) -> TaskEmbedding | None:
    """Take a fitted task's embedding out of its tensors; None, where the adapter has no task encoder."""
    if adapter.inner.conditioning is None:
        return None  # what is there all the same is no LoRA factor, and refused as that
    shapes = {
        TASK_VECTOR: (adapter.inner.conditioning.task_encoder.size,),
        TASK_CLASSES: (len(classes), adapter.feature_size),
    }
    found = []
    for name, shape in shapes.items():
        value = tensors.pop(name, torch.empty(0))
        if value.shape != shape or not ((value.double().norm(dim=-1) - 1).abs() <= UNIT_TOLERANCE).all():
            raise AdapterError(
                f"{path}: {name} must have shape {shape} and length 1, as the adapter's task encoder makes it; found "
                f"{value!s:.60} of shape {tuple(value.shape)}"
            )
        found.append(value.numpy())
    return TaskEmbedding(found[0], found[1], tuple(classes))
