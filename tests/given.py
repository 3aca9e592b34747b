"""What tests of the classifier are given: an adapter of the tiny encoder, and small tasks."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from textmeta import Adapter, Corpus
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.meta.initialisation import Initialisation, LearnerSettings

Patch, Shown, Logged = pytest.MonkeyPatch, pytest.CaptureFixture[str], pytest.LogCaptureFixture

RULE = torch.tensor([4.0, 3.0, 0.5, 0.3, -0.4, 0.2, -0.3, -2.0])
SUPPORT = ["bal bel bil", "bam ben", "fim fon", "fal fel fil fol", "kut kon", "kel kas kim"]
LABELS = list("bbffkk")
NAMES = {"b": "bum", "f": "fon", "k": "kel"}
TEXTS = ["bal bel", "fim fon gur dal kes", "bal", "kut kut dal fim bel bol bun bam ban", "dis dur", ""]


def doubled(encoder: Encoder) -> Encoder:
    """Let an encoder compute in float64."""
    for half in filter(None, (encoder._prefix, encoder._suffix)):
        half.double()
    return encoder


def adapter_of(model: str, *, scope: torch.Tensor | None = RULE, **settings: Any) -> Adapter:
    """Return an adapter of the tiny encoder as meta-training leaves one: LoRA, queries and centre are not 0."""
    learner = LearnerSettings(**{"steps": 3, **settings})
    encoder = Encoder(EncoderSettings(model, max_length=32), LoraSettings(rank=4))
    reader = TokenStateReader(encoder, learner.layers)
    learner = replace(learner, layers=reader.layers)
    start = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, learner, seed=0)
    random = torch.Generator().manual_seed(0)
    learned = {
        name: value + 0.05 * torch.randn(value.shape, generator=random)
        for name, value in start.tensors().items()
        if ".lora_B." in name or name in ("queries", "centre", "name_centre")
    }
    adapter = Adapter.of(reader, learner, start.with_tensors({**start.tensors(), **learned}))
    return replace(adapter, scope=scope, record={"episodes": 7})


def task(corpus: Corpus, names: list[str], shots: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """Return support texts and labels, and the other texts of the classes with theirs."""
    support, query = [], []
    for name in names:
        rows = corpus.rows_of(corpus.class_names.index(name)).tolist()
        support += [(corpus.texts[row], name) for row in rows[:shots]]
        query += [(corpus.texts[row], name) for row in rows[shots:]]
    return [t for t, _ in support], [n for _, n in support], [t for t, _ in query], [n for _, n in query]
