"""Meta-gradients against fourth-order finite differences in float64, for everything that is learned.

:func:`test_the_check_can_fail` shows in every run that a first-order gradient does not pass for MAML's. Those of
first order are compared in ``test_peer.py``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.given import Patch
from tests.meta.given import LAYERS, ROWS, episode_of, leaves_of, make_learner, make_task, with_values
from textmeta import Corpus, Episode
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.token_states import Entering, TokenStateReader, TokenStates
from textmeta.meta import algorithms as algorithms_module
from textmeta.meta import learner as learner_module
from textmeta.meta.algorithms import ALGORITHMS, query_losses
from textmeta.meta.batch import TaskBatch
from textmeta.meta.initialisation import LearnerSettings
from textmeta.meta.learner import TaskLearner

Tensors = dict[str, Tensor]
TOLERANCE = 1e-6

OF_STEPS = {"pull", "step_gate"}
OF_FEATURE_STEPS = {"loss_view_weights", "loss_log_scale"}
SIZES = {"queries": "log_step_sizes", "lora": "lora_log_step_sizes", "offset": "offset_log_step_sizes"}
IN_STEPS = {".lora_A.", ".lora_B.", "queries", *SIZES.values(), *OF_STEPS, *OF_FEATURE_STEPS}
# what has no part in a learner's loss, by what it adapts
NO_PART = {
    "none": {*SIZES.values(), *OF_STEPS, *OF_FEATURE_STEPS},
    "pooling": {SIZES["lora"], SIZES["offset"]},
    "lora": {SIZES["queries"], SIZES["offset"]},
    "pooling+lora": {SIZES["offset"]},
    "offset": {SIZES["queries"], SIZES["lora"], *OF_FEATURE_STEPS},
}


def tasks(corpus: Corpus) -> list[Episode]:
    """With names, unlabelled texts and a class of one example; names alone; two classes alone; no class of two."""
    return [
        episode_of(task)
        for task in (
            make_task(corpus, (1, 3, 4), names=True, unlabelled=4),
            make_task(corpus, (0, 0), names=True, first=3),
            make_task(corpus, (2, 3), first=6),
            make_task(corpus, (1, 1, 1), names=True, first=8),
        )
    ]


def large_task(corpus: Corpus) -> list[Episode]:
    """More texts than an inner step is on, so that the steps see parts of them in turn; beside it a small task."""
    return [episode_of(make_task(corpus, sizes)) for sizes in ((16, 15, 16, 14, 1, 16, 13, 16, 15, 16), (3, 2))]


class Remembering:
    """Reads token states once, as long as LoRA's factors are those that it knows."""

    def __init__(self, reader: TokenStateReader, factors: Mapping[str, Tensor]) -> None:
        self.reader, self.factors = reader, factors
        self.known: dict[tuple[str, ...], TokenStates] = {}

    def entering(self, texts: Sequence[str]) -> Iterable[Entering]:
        return self.reader.entering(texts)

    def read(
        self, texts: Sequence[str], factors: Mapping[str, Tensor] | None = None, *rest: object, **more: object
    ) -> TokenStates:
        if factors is None or any(
            factors[n].shape != value.shape or not torch.equal(factors[n], value) for n, value in self.factors.items()
        ):
            return self.reader.read(texts, factors, *rest, **more)
        if tuple(texts) not in self.known:
            self.known[tuple(texts)] = self.reader.read(texts, factors)
        return self.known[tuple(texts)]


def objective(learner: TaskLearner, tensors: Mapping[str, Tensor], episodes: list[Episode]) -> float:
    """The function whose gradient an exact algorithm claims to return, by plain evaluation."""
    with torch.no_grad():
        return float(query_losses(with_values(learner, tensors), episodes, second_order=False)[0].sum())


def relative_errors(
    loss: Callable[[Tensors], float], tensors: Tensors, found: Tensors, h: float = 1e-4, apart: set[str] | None = None
) -> dict[str, float]:
    """For each tensor, along a direction: |⟨gradient, direction⟩ - difference| over the gradient's norm.

    LoRA's A go together, each in a direction of its own, and so do B, as their differences need the encoder; and all
    tensors that are not among those ``apart``, where these are given.
    """
    generator = torch.Generator().manual_seed(0)
    errors = {}
    groups: dict[str, list[str]] = {}
    for name in tensors:
        group = next((part for part in (".lora_A.", ".lora_B.") if part in name), name)
        group = group if apart is None or group in apart else "rest"
        groups.setdefault(group, []).append(name)
    for group, names in groups.items():
        ways = {}
        for name in names:
            way = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
            # half along the gradient, so that it is seen; half at random, so that what is missing is
            way = way / way.norm() + found[name] / found[name].norm().clamp(min=1e-12)
            ways[name] = way / way.norm() if way.ndim else torch.ones_like(way)
        values = {
            s: loss({**tensors, **{name: tensors[name] + s * h * way for name, way in ways.items()}})
            for s in (-2, -1, 1, 2)
        }
        expected = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
        norm = max(float(sum(found[name].square().sum() for name in names)) ** 0.5, 1e-4)
        errors[group] = abs(float(sum((found[name] * way).sum() for name, way in ways.items())) - expected) / norm
    return errors


def prepared(learner: TaskLearner, episodes: list[Episode]) -> tuple[TaskLearner, Tensors]:
    """The learner with a reader that remembers, so that differences cost little; and its tensors."""
    init = learner.adapter.initialisation
    texts = {text for e in episodes for text in (*e.support_texts, *e.query_texts, *e.unlabelled_texts)}
    learner.reader.cache([*texts, *(name for e in episodes for name in e.label_names or ())])  # type: ignore[attr-defined]
    return TaskLearner(Remembering(learner.reader, init.lora), learner.adapter), init.tensors()


def gradient_of(name: str, learner: TaskLearner, episodes: list[Episode]) -> Tensors:
    differentiated, leaves = leaves_of(learner)
    return ALGORITHMS[name].gradient(differentiated, episodes, leaves).gradient


EXACT = {
    **{f"maml-{adapt}": ("maml", LearnerSettings(LAYERS, adapt, 2)) for adapt in NO_PART},  # type: ignore[arg-type]
    **{name: ROWS[name] for name in ("anil-offset", "meta_sgd-pooling", "protonet-none")},
}


ALL_APART = [EXACT["maml-none"][1], EXACT["maml-pooling"][1]]


@pytest.mark.parametrize(("name", "settings"), EXACT.values(), ids=EXACT)
def test_every_tensor_is_exact(name: str, settings: LearnerSettings, encoder64: Encoder, corpus: Corpus) -> None:
    learner, episodes = make_learner(encoder64, settings), tasks(corpus)
    found = gradient_of(name, learner, episodes)
    # prototypes are made of the labelled texts alone, without a penalty, but unlabelled ones move the centre
    without = NO_PART[settings.adapt] | ({"unlabelled_weight"} if settings.head == "prototype" else set())
    # numbers that the steps do not use have directions of their own once with steps, once without
    apart = None if settings in ALL_APART else IN_STEPS
    learner, tensors = prepared(learner, episodes)
    errors = relative_errors(lambda t: objective(learner, t, episodes), tensors, found, apart=apart)
    assert max(errors.values()) < TOLERANCE, errors
    assert {name for name, value in found.items() if value.norm() < 1e-6} == without  # no nothing passes for something


def test_steps_on_parts_of_a_large_task(encoder64: Encoder, corpus: Corpus) -> None:
    """In what goes through the steps."""
    settings = LearnerSettings(LAYERS, "pooling+lora", steps=2)
    learner, episodes = make_learner(encoder64, settings), large_task(corpus)
    found = gradient_of("maml", learner, episodes)
    learner, tensors = prepared(learner, episodes)
    own = {
        name: value
        for name, value in tensors.items()
        if name in {"queries", "log_step_sizes", "loss_view_weights"} or ".lora_B." in name
    }
    errors = relative_errors(lambda t: objective(learner, {**tensors, **t}, episodes), own, found)
    assert max(errors.values()) < TOLERANCE, errors
    assert all(found[name].norm() > 1e-6 for name in own)


@pytest.mark.parametrize("adapt", ["lora", "pooling+lora"])
def test_steps_computed_again_are_the_same(adapt: str, encoder64: Encoder, corpus: Corpus, monkeypatch: Patch) -> None:
    """In all that is learned: log step sizes, the loss's scale and its view weights, too."""
    settings = LearnerSettings(LAYERS, adapt, steps=3)  # type: ignore[arg-type]
    learner, episodes = make_learner(encoder64, settings), tasks(corpus)
    ways: list[bool] = []
    usual = learner_module.inner_steps

    def watched(*given, checkpointed: bool, **more):
        ways.append(checkpointed)
        return usual(*given, checkpointed=checkpointed, **more)

    monkeypatch.setattr(learner_module, "inner_steps", watched)
    kept = gradient_of("maml", learner, episodes)
    monkeypatch.setattr(learner_module, "KEPT_TEXTS", 0)
    again = gradient_of("maml", learner, episodes)
    monkeypatch.setattr(algorithms_module, "KEPT_TEXTS", 0)
    apart = gradient_of("maml", learner, episodes)
    assert ways == [False, True, True, True], "two of the tasks take steps"
    for name, value in kept.items():
        atol = 1e-10 * float(value.abs().amax())
        for other in (again, apart):
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("adapt", ["pooling", "lora", "offset"])
def test_the_check_can_fail(adapt: str, encoder64: Encoder, corpus: Corpus) -> None:
    settings = LearnerSettings(LAYERS, adapt, steps=2)  # type: ignore[arg-type]
    learner, episodes = make_learner(encoder64, settings), tasks(corpus)
    found = gradient_of("fomaml", learner, episodes)
    learner, tensors = prepared(learner, episodes)
    own = {name: value for name, value in tensors.items() if name == "queries" or ".lora_B." in name}
    errors = relative_errors(lambda t: objective(learner, {**tensors, **t}, episodes), own, found)
    assert errors.keys() == {"queries", ".lora_B."}
    assert min(errors.values()) > 100 * TOLERANCE


def test_where_a_gradient_of_the_steps_is_zero(encoder64: Encoder, corpus: Corpus) -> None:
    """Of texts that are all the same it is exactly 0, but has derivatives."""
    settings = LearnerSettings(LAYERS, "pooling", steps=2)
    learner = make_learner(encoder64, settings)
    task = make_task(corpus, (3, 3), names=True)
    episode = replace(episode_of(task), support_texts=(task.texts[0],) * 6)
    queries = learner.learn(TaskBatch.of_episodes([episode])).queries
    torch.testing.assert_close(queries[0], learner.adapter.initialisation.queries, rtol=0, atol=1e-9)
    found = gradient_of("maml", learner, [episode])
    learner, tensors = prepared(learner, [episode])
    assert all(value.isfinite().all() for value in found.values())
    errors = relative_errors(lambda t: objective(learner, t, [episode]), tensors, found, h=1e-5)
    assert max(errors.values()) < 1e-5, errors
