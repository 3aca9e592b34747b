"""Small adapters, none of whose numbers is at its start, and ways to damage the folders they are saved in."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.meta.adapter import Adapter, ClassIndex
from textmeta.meta.batch import Rows, TaskBatch
from textmeta.meta.initialisation import Adapt, Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner
from textmeta.sharing.folder import MANIFEST
from textmeta.sharing.store import Fitted, save_adapter
from textmeta.sharing.support import FitInputs

LISTED = ("adapter_config.json", "adapter_model.safetensors", "textmeta.json", "textmeta.safetensors")
FITTED = ("classifier.json", "classifier.safetensors")
LORA_A = "base_model.model.encoder.layer.3.attention.self.query.lora_A.weight"
TEXTS, NUMBERS, LABELS = ["bal bel", "bil bol", "dal del", "dil dol"], [0, 0, 1, 1], ["b", "d"]
QUERIES = ["bal bol", "del dol", "bel dal fim"]
RECORD = {"settings": {"algorithm": "fomaml", "episodes": 40, "corpora": []}, "sources": [], "größe": [1, 2.5, None]}


def make_reader(model: str) -> TokenStateReader:
    return TokenStateReader(Encoder(EncoderSettings(model, max_length=32), LoraSettings(rank=4)))


def make_adapter(reader: TokenStateReader, seed: int = 0, adapt: Adapt = "pooling", **learner: Any) -> Adapter:
    """Return an adapter with a scope rule and an index."""
    generator = torch.Generator().manual_seed(seed)
    settings = LearnerSettings(layers=reader.layers, adapt=adapt, steps=2, **learner)
    start = Initialisation.start(reader.encoder.factor_shapes, reader.encoder.hidden_size, settings, seed)
    random = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in start.tensors().items()
    }
    adapter = Adapter.of(reader, settings, start.with_tensors(random))
    return replace(adapter, scope=torch.arange(8.0), index=make_index(), record=RECORD)


def make_index() -> ClassIndex:
    return ClassIndex({"größe": ("klein", "groß"), "a/b": ("klein",)}, {"größe": unit(2), "a/b": unit(1, seed=1)})


def unit(rows: int, seed: int = 0, size: int = 32) -> np.ndarray:
    """Return random float32 rows of length 1."""
    found = np.random.default_rng(seed).normal(size=(rows, size)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def fit(reader: TokenStateReader, adapter: Adapter, *, keep: bool = False) -> Fitted:
    batch = TaskBatch.of([TEXTS], [NUMBERS], [2], [["bal", "dal"]])
    with torch.no_grad():
        task = TaskLearner(reader, adapter).learn(batch)
    examples = tuple((text, LABELS[number], 1.0) for text, number in zip(TEXTS, NUMBERS, strict=True))
    return Fitted(task, list(LABELS), FitInputs(examples) if keep else None)


def logits(reader: TokenStateReader, adapter: Adapter, fitted: Fitted | None = None) -> Tensor:
    """Return what a classifier, fitted anew unless one is given, makes of the queries, (3, 2)."""
    fitted = fitted or fit(reader, adapter)
    with torch.no_grad():
        return TaskLearner(reader, adapter).answer(fitted.task, Rows.of([QUERIES], torch.device("cpu"))).logits[0]


def save(folder: Path, model: str) -> None:
    """Save a fitted classifier."""
    reader = make_reader(model)
    adapter = make_adapter(reader)
    save_adapter(folder, adapter, fit(reader, adapter))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and its hash: what a writer with a fault, or an enemy, would write."""
    (folder / name).write_bytes(content)
    lines = [line for line in (folder / MANIFEST).read_text().splitlines() if not line.endswith(f"  {name}")]
    lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}")
    (folder / MANIFEST).write_text("\n".join(sorted(lines, key=lambda line: line[66:])) + "\n")


def rewrite_tensors(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    rewrite(folder, name, save_tensors(tensors, metadata={"format": "pt"}))


def rewrite_json(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    rewrite(folder, name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
