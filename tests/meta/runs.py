"""What the tests of training are given: short runs on the toy corpus, and ways to look at them and to disturb them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.given import Patch
from textmeta import Adapter, Corpus, MetaTrainer
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.meta import outer_loop
from textmeta.meta import trainer as trainer_module
from textmeta.meta.algorithms import ALGORITHMS, MetaGradient
from textmeta.meta.initialisation import LearnerSettings
from textmeta.meta.learner import TaskLearner
from textmeta.meta.outer_loop import RECORD

LEARNER = LearnerSettings((2, 4), steps=2)
SHORT = {"CALIBRATION_EPISODES": 2, "WARMUP": 2, "CHECKPOINT_EVERY": 2}

Train = Callable[..., Adapter]


def set_constants(monkeypatch: Patch, **values: int) -> None:
    """Change constants of training, in the module that has each."""
    for name, value in values.items():
        monkeypatch.setattr(outer_loop if hasattr(outer_loop, name) else trainer_module, name, value)


def trainer_of(tiny_model: str, **settings) -> MetaTrainer:
    """Six steps of one episode."""
    given = {
        "encoder": EncoderSettings(tiny_model, max_length=32),
        "lora": LoraSettings(rank=4),
        "learner": LEARNER,
        "episodes": 6,
        "tasks_per_step": 1,
        **settings,
    }
    return MetaTrainer(**given)


def train_on(tiny_model: str, corpus: Corpus, output: Path | None = None, *, valid: int = 0, **given) -> Adapter:
    """Train on the first five classes; validate on so many of the others; ``given`` to train, or as settings."""
    how = {name: given.pop(name) for name in ("start", "cache", "callback", "track") if name in given}
    names = corpus.class_names
    held_out = [corpus.restrict(names[5 : 5 + valid])] if valid else []
    trainer = trainer_of(tiny_model, **given)
    return trainer.train(corpus.restrict(names[:5]), held_out, output, **how)


def rows_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / RECORD).read_text().splitlines()]


def assert_same(one: Adapter, two: Adapter) -> None:
    left, right = one.initialisation.tensors(), two.initialisation.tensors()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert torch.equal(one.scope, two.scope)  # type: ignore[arg-type]
    assert one.record == two.record


def on_each_step(monkeypatch: Patch, algorithm: str, action: Callable[[int, Mapping[str, Tensor]], None]) -> None:
    """Call an action as each step begins, with the number of steps begun so far, and the tensors."""
    row, begun = ALGORITHMS[algorithm], 0

    def gradient(learner: TaskLearner, *given) -> MetaGradient:
        nonlocal begun
        action(begun, learner.adapter.initialisation.tensors())
        begun += 1
        return row.gradient(learner, *given)

    monkeypatch.setitem(ALGORITHMS, algorithm, replace(row, gradient=gradient))


class Died(Exception):  # noqa: N818
    pass
