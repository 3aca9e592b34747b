import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.conftest import WORDS
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.meta.adaptation import adapt, adaptation_path, query_logits, start_parameters, task_weights
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import query_batch, support_and_query_batch, support_batch, task_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS, class_weights, name_weights
from textmeta.model.initialisation import (
    LOG_ADAPTED_FACTOR,
    LOG_NAME_WEIGHT,
    LOG_STEP_SIZE,
    LORA,
    OFFSET,
    Parameters,
    head_scalars,
    lora_factors,
)

INNER = InnerLoopSettings(steps=2, lora_step_size=0.05, offset_step_size=0.02, lora_epsilon=1e-4, offset_epsilon=1e-3)
NEIGHBOURS = replace(INNER, adapt=("lora_B",), loss="neighbours")


def moved_parameters(encoder: Encoder, inner: InnerLoopSettings = INNER) -> Parameters:
    """A start with B away from 0, so that A and B both count, and a step size of its own for each step."""
    start = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    generator = torch.Generator().manual_seed(1)
    for name, value in start.items():
        if name.startswith((LORA, LOG_STEP_SIZE)):
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    start[LOG_NAME_WEIGHT].fill_(0.6)
    return start


def named(e: Episode) -> Episode:
    """The same task with names: a word of each class's own."""
    return replace(e, label_names=tuple(WORDS[12 * int(name.removeprefix("class"))] for name in e.class_names))


def of_shots(corpus: Corpus, shots: list[int], seed: int = 0) -> Episode:
    """An episode with so many examples of each class."""
    e = EpisodeSampler(corpus, EpisodeSettings(len(shots), max(shots), 2), seed)[0]
    kept = np.concatenate([np.flatnonzero(e.support_labels == c)[:n] for c, n in enumerate(shots)])
    return replace(e, support_texts=tuple(e.support_texts[row] for row in kept), support_labels=e.support_labels[kept])


def support_loss(
    encoder: Encoder, parameters: Parameters, factors: dict[str, Tensor], offset: Tensor, e: Episode
) -> Tensor:
    """The leave-one-out loss of one task, example by example: another way to the same number."""
    names = e.label_names or ()
    features = encoder.features(encoder.prepare([*e.support_texts, *names]), factors)
    labels = torch.tensor([*e.support_labels, *range(len(names))])
    is_name = torch.tensor([False] * len(e.support_texts) + [True] * len(names))
    scalars = head_scalars(parameters)
    rows = name_weights(is_name, scalars)
    assert rows is not None
    losses = []
    for i in range(len(e.support_texts)):
        keep = torch.arange(len(labels)) != i
        if (labels[keep] != labels[i]).all():
            continue
        whole = class_weights(features[None], labels[None], offset[None], {}, rows[None])[0]
        rest = class_weights(features[keep][None], labels[keep][None], offset[None], {}, rows[keep][None])[0]
        weights = torch.where((torch.arange(e.ways) == labels[i])[:, None], rest, whole)
        logits = scalars["temperature"] * features[i] @ torch.nn.functional.normalize(weights, dim=1).T
        losses.append(cross_entropy(logits, labels[i]))
    return torch.stack(losses).mean()


def steps_by_hand(encoder: Encoder, parameters: Parameters, e: Episode, inner: InnerLoopSettings) -> dict[str, Tensor]:
    """θ_{j+1} = θ_j - α_j g / (rms(g) + ε), one task, one tensor after another."""
    factors = lora_factors(parameters)
    offset = torch.zeros(e.ways, encoder.hidden_size)
    fast = {name: value for name, value in factors.items() if "lora_B" in name} | {OFFSET: offset}
    for step in range(inner.steps):
        fast = {name: value.clone().requires_grad_() for name, value in fast.items()}
        used = factors | {name: value for name, value in fast.items() if name != OFFSET}
        loss = support_loss(encoder, parameters, used, fast[OFFSET], e)
        gradients = torch.autograd.grad(loss, list(fast.values()))
        for (name, value), gradient in zip(list(fast.items()), gradients, strict=True):
            group, epsilon = (OFFSET, inner.offset_epsilon) if name == OFFSET else ("lora", inner.lora_epsilon)
            size = parameters[LOG_STEP_SIZE + group][step].exp()
            fast[name] = (value - size * gradient / (gradient.square().mean().sqrt() + epsilon)).detach()
    return fast


def adapted_tensors(
    encoder: Encoder, parameters: Parameters, episodes: list[Episode], inner: InnerLoopSettings
) -> dict[str, Tensor]:
    adapted = adapt(encoder, parameters, support_batch(encoder, episodes), inner)
    return {**{n: v for n, v in adapted.factors.items() if v.ndim == 3}, OFFSET: adapted.offset}


@pytest.mark.parametrize("names", [False, True])
def test_steps_are_the_formula(names: bool, encoder: Encoder, sampler: EpisodeSampler) -> None:
    parameters, episode = moved_parameters(encoder), named(sampler[0]) if names else sampler[0]
    found = adapted_tensors(encoder, parameters, [episode], INNER)
    expected = steps_by_hand(encoder, parameters, episode, INNER)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name][0], value, rtol=1e-3, atol=1e-5)
        start = 0 if name == OFFSET else parameters[LORA + name]
        assert (value - start).abs().max() > 1e-3  # the steps went somewhere


@pytest.mark.parametrize("inner", [INNER, NEIGHBOURS], ids=["head", "neighbours"])
def test_tasks_together_are_the_tasks_alone(inner: InnerLoopSettings, encoder: Encoder, corpus: object) -> None:
    """Different ways, shots and lengths in one batch: padding must not leak into any task."""
    settings = EpisodeSettings(ways=(2, 6), shots=(1, 5), queries=3, unbalanced=True)
    episodes = EpisodeSampler(corpus, settings, seed=3).take(5)  # type: ignore[arg-type]
    assert len({e.ways for e in episodes}) > 1
    zero = replace(settings, shots=(0, 2), label_names=1.0)
    episodes = [*episodes[:3], *map(named, episodes[3:]), *map(named, EpisodeSampler(corpus, zero, seed=3).take(2))]  # type: ignore[arg-type]
    parameters = moved_parameters(encoder)
    together = adapted_tensors(encoder, parameters, episodes, inner)
    for number, e in enumerate(episodes):
        alone = adapted_tensors(encoder, parameters, [e], inner)
        for name, value in alone.items():
            found = together[name][number, : e.ways] if name == OFFSET else together[name][number]
            torch.testing.assert_close(found, value[0].expand_as(found), rtol=1e-3, atol=1e-5)


def is_of_step(labels: list[int], row: int, step: int) -> bool:
    """Whether a step is on an example: the first on the first ten of its class, the next on the next ten, around."""
    own = [i for i, label in enumerate(labels) if label == labels[row]]
    return len(own) <= 10 or row in [own[(10 * step + i) % len(own)] for i in range(10)]


def neighbours_by_hand(
    encoder: Encoder, parameters: Parameters, e: Episode, inner: InnerLoopSettings
) -> dict[str, Tensor]:
    """The same steps on the loss of neighbours, pair by pair."""
    names = e.label_names or ()
    texts = encoder.prepare([*e.support_texts, *names])
    labels = [*e.support_labels.tolist(), *range(len(names))]
    kappa = float(parameters[LOG_NAME_WEIGHT].exp())
    weights = [1.0] * len(e.support_texts) + [kappa] * len(names)
    factors = lora_factors(parameters)
    fast = {name: value for name, value in factors.items() if "lora_B" in name}
    mean = len(labels) / e.ways
    taking = [c for c in range(e.ways) if labels.count(c) >= mean / 2]
    for step in range(inner.steps):
        examples = [i for i in range(len(e.support_texts)) if is_of_step(e.support_labels.tolist(), i, step)]
        on = [*examples, *range(len(e.support_texts), len(labels))]
        fast = {name: value.clone().requires_grad_() for name, value in fast.items()}
        features, losses = encoder.features(texts, factors | fast), []
        for i in [i for i in examples if labels[i] in taking]:
            logits = []
            for c in taking:
                rows = [j for j in on if labels[j] == c and j != i]
                near = [weights[j] * torch.exp(10 * features[i] @ features[j]) for j in rows]
                logits.append((torch.stack(near).sum() / sum(weights[j] for j in rows)).log())
            losses.append(cross_entropy(torch.stack(logits), torch.tensor(taking.index(labels[i]))))
        gradients = torch.autograd.grad(torch.stack(losses).mean(), list(fast.values()))
        size = parameters[LOG_STEP_SIZE + "lora"][step].exp()
        for (name, value), g in zip(list(fast.items()), gradients, strict=True):
            fast[name] = (value - size * g / (g.square().mean().sqrt() + inner.lora_epsilon)).detach()
    return fast


@pytest.mark.parametrize("shots", [[3, 3, 3], [13, 12, 4]], ids=["few", "many, not of all"])
@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_steps_on_neighbours_are_the_formula(
    head: Any, names: bool, shots: list[int], encoder: Encoder, corpus: Corpus
) -> None:
    """Whatever the head."""
    inner = replace(NEIGHBOURS, head=head)
    episode = of_shots(corpus, shots)
    parameters, episode = moved_parameters(encoder, inner), named(episode) if names else episode
    found = adapted_tensors(encoder, parameters, [episode], inner)
    expected = neighbours_by_hand(encoder, parameters, episode, inner)
    assert found.keys() == expected.keys() | {OFFSET}
    assert not found[OFFSET].any()
    for name, value in expected.items():
        torch.testing.assert_close(found[name][0], value, rtol=1e-3, atol=1e-5)
        assert (value - parameters[LORA + name]).abs().max() > 1e-3  # the steps went somewhere


def test_a_class_of_few_examples_among_others_takes_no_part_in_steps_on_neighbours(
    encoder: Encoder, corpus: Corpus
) -> None:
    parameters, few = moved_parameters(encoder), of_shots(corpus, [5, 5, 1])
    without = replace(
        few,
        class_names=few.class_names[:2],
        support_texts=few.support_texts[:10],
        support_labels=few.support_labels[:10],
    )
    alone = of_shots(corpus, [9, 1, 1])  # the first class would be the only one
    found = adapted_tensors(encoder, parameters, [few, alone], NEIGHBOURS)
    expected = adapted_tensors(encoder, parameters, [without], NEIGHBOURS)
    moved = [name for name in expected if name != OFFSET]
    assert moved
    for name in moved:
        torch.testing.assert_close(found[name][0], expected[name][0], rtol=1e-4, atol=1e-6)
        assert (found[name][0] - parameters[LORA + name]).abs().max() > 1e-3
        assert torch.equal(found[name][1], parameters[LORA + name])
    head = adapted_tensors(encoder, parameters, [few], INNER)  # this loss is of all rows
    by_hand = steps_by_hand(encoder, parameters, few, INNER)
    for name, value in by_hand.items():
        torch.testing.assert_close(head[name][0], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", ["head", "neighbours"])
def test_examples_alone_in_their_class_leave_the_start_as_it_is(loss: Any, encoder: Encoder, corpus: object) -> None:
    inner = INNER if loss == "head" else NEIGHBOURS
    one_shot = EpisodeSampler(corpus, EpisodeSettings(4, 1, 2), seed=0).take(2)  # type: ignore[arg-type]
    many_shot = EpisodeSampler(corpus, EpisodeSettings(4, 3, 2), seed=0).take(1)  # type: ignore[arg-type]
    parameters = moved_parameters(encoder)
    adapted = adapt(encoder, parameters, support_batch(encoder, one_shot), inner)
    assert all(factor.ndim == 2 for factor in adapted.factors.values())  # not even a forward was needed
    mixed = adapted_tensors(encoder, parameters, [*one_shot, *many_shot], inner)
    for name, value in mixed.items():
        start = torch.zeros_like(value[0]) if name == OFFSET else parameters[LORA + name]
        assert torch.equal(value[0], start)
        assert torch.equal(value[1], start)
        assert torch.equal(value[2], start) == (name == OFFSET and loss == "neighbours")


def test_a_solved_task_makes_a_small_step(encoder: Encoder, sampler: EpisodeSampler) -> None:
    parameters = moved_parameters(encoder)
    large_epsilon = replace(INNER, lora_epsilon=1e3, offset_epsilon=1e3)
    moved = adapted_tensors(encoder, parameters, [sampler[0]], large_epsilon)
    assert moved[OFFSET].abs().max() < 1e-4


def test_adaptation_lowers_the_support_loss(encoder: Encoder, sampler: EpisodeSampler) -> None:
    inner = replace(INNER, steps=8)
    parameters = moved_parameters(encoder, inner)
    for e in sampler.take(3):
        adapted = adapt(encoder, parameters, support_batch(encoder, [e]), inner)
        factors = {name: value[0] if value.ndim == 3 else value for name, value in adapted.factors.items()}
        before = support_loss(encoder, parameters, lora_factors(parameters), torch.zeros(e.ways, 32), e)
        after = support_loss(encoder, parameters, factors, adapted.offset[0], e)
        assert after < 0.8 * before


def test_what_is_not_to_be_adapted_stays(encoder: Encoder, sampler: EpisodeSampler) -> None:
    parameters = moved_parameters(encoder)
    for part, parts in {"offset": ("offset",), "lora_A": ("lora_A",), "lora_B": ("lora_B",)}.items():
        adapted = adapt(encoder, parameters, support_batch(encoder, [sampler[0]]), replace(INNER, adapt=parts))
        moved = {n.split(".")[-2] for n, v in adapted.factors.items() if v.ndim == 3}
        assert moved == ({part} if part != OFFSET else set())
        assert bool(adapted.offset.any()) == (part == OFFSET)


def test_the_order_of_examples_does_not_matter(encoder: Encoder, sampler: EpisodeSampler) -> None:
    e = sampler[0]
    turned = replace(e, support_texts=e.support_texts[::-1], support_labels=e.support_labels[::-1].copy())
    parameters = moved_parameters(encoder)
    one, two = (adapted_tensors(encoder, parameters, [episode], INNER) for episode in (e, turned))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)


def test_query_logits_are_cosines_to_the_task_weights(encoder: Encoder, sampler: EpisodeSampler) -> None:
    e = sampler[0]
    parameters = moved_parameters(encoder)
    support, query = support_batch(encoder, [e]), query_batch(encoder, [e])
    adapted = adapt(encoder, parameters, support, INNER)
    weights = task_weights(encoder, adapted, support)
    logits = query_logits(encoder, adapted, weights, query)
    factors = {name: value[0] if value.ndim == 3 else value for name, value in adapted.factors.items()}
    features = encoder.features(encoder.prepare(e.query_texts), factors)
    expected = head_scalars(parameters)["temperature"] * features @ torch.nn.functional.normalize(weights[0], dim=1).T
    torch.testing.assert_close(logits[0], expected)


def test_names_are_rows_of_their_own_after_the_examples(encoder: Encoder, sampler: EpisodeSampler) -> None:
    batch = support_batch(encoder, [sampler[0], named(sampler[1])])
    assert batch.is_name is not None
    assert batch.is_name.tolist() == [[False] * 12, [False] * 9 + [True] * 3]
    assert batch.labels[0].tolist() == [*sampler[0].support_labels, -1, -1, -1]
    assert batch.labels[1].tolist() == [*sampler[1].support_labels, 0, 1, 2]
    assert batch.texts.texts[-3:] == named(sampler[1]).label_names
    assert support_batch(encoder, sampler.take(2)).is_name is None
    assert query_batch(encoder, [named(sampler[0])]).is_name is None
    both = support_and_query_batch(encoder, [named(sampler[0])])
    assert both.is_name is not None
    assert both.is_name.sum() == 3
    assert both.labels[0, -3:].tolist() == [0, 1, 2]


def test_a_class_may_lack_a_name(encoder: Encoder) -> None:
    batch = task_batch(encoder, [["bal", "fim"]], [[2, 0]], [3], [["bel", "fon", None]])
    assert batch.labels.tolist() == [[2, 0, 0, 1]]
    assert batch.is_name is not None
    assert batch.is_name.tolist() == [[False, False, True, True]]
    assert batch.class_labels.tolist() == [[2, 0, -1, 1]]  # of class 1 there is nothing else
    none = task_batch(encoder, [["bal", "fim"]], [[1, 0]], [2], [[None, None]])
    assert none.is_name is None
    assert none.class_labels is none.labels


def test_prototypes_are_examples_plus_the_weighted_name(encoder: Encoder, sampler: EpisodeSampler) -> None:
    parameters, e = moved_parameters(encoder), named(sampler[0])
    support = support_batch(encoder, [e])
    adapted = adapt(encoder, parameters, support, replace(INNER, steps=0))
    found = task_weights(encoder, adapted, support)[0]
    assert e.label_names is not None
    factors = lora_factors(parameters)
    features, names = (encoder.features(encoder.prepare(part), factors) for part in (e.support_texts, e.label_names))
    for c in range(e.ways):
        total = features[torch.as_tensor(e.support_labels) == c].sum(0) + math.exp(0.6) * names[c]
        torch.testing.assert_close(found[c], total / total.norm())


def test_one_example_and_a_name_are_enough_to_learn_from(encoder: Encoder, corpus: object) -> None:
    e = EpisodeSampler(corpus, EpisodeSettings(4, 1, 2), seed=0)[0]  # type: ignore[arg-type]
    parameters = moved_parameters(encoder)
    found, expected = (
        adapted_tensors(encoder, parameters, [named(e)], INNER),
        steps_by_hand(encoder, parameters, named(e), INNER),
    )
    assert adapted_tensors(encoder, parameters, [e], INNER).keys() == {OFFSET}, "alone in their classes"
    for name, value in expected.items():
        torch.testing.assert_close(found[name][0], value, rtol=1e-3, atol=1e-5)
        assert value.any()


def test_names_alone_leave_the_start_as_it_is(encoder: Encoder, corpus: object) -> None:
    settings = EpisodeSettings(4, 0, 2, label_names=1.0)
    e = named(EpisodeSampler(corpus, settings, seed=0)[0])  # type: ignore[arg-type]
    parameters = moved_parameters(encoder)
    support = support_batch(encoder, [e])
    adapted = adapt(encoder, parameters, support, INNER)
    assert all(factor.ndim == 2 for factor in adapted.factors.values())
    assert e.label_names is not None
    names = encoder.features(encoder.prepare(e.label_names), lora_factors(parameters))
    torch.testing.assert_close(task_weights(encoder, adapted, support)[0], names)


def test_the_temperature_is_another_once_a_task_has_taken_steps(encoder: Encoder, corpus: Corpus) -> None:
    """Beside one that takes none, which keeps its own; and the steps themselves are those at the temperature before."""
    inner = replace(INNER, steps=2)
    parameters, factor = moved_parameters(encoder, inner), torch.tensor(0.4)
    episodes = [EpisodeSampler(corpus, EpisodeSettings(3, shots, 2), seed=0)[0] for shots in (1, 3)]
    support = support_batch(encoder, episodes)
    usual = list(adaptation_path(encoder, parameters, support, inner))
    found = list(adaptation_path(encoder, {**parameters, LOG_ADAPTED_FACTOR: factor}, support, inner))
    for number, (one, other) in enumerate(zip(usual, found, strict=True)):
        expected = torch.stack([torch.tensor(0.0), factor * bool(number)]).exp() * one.scalars["temperature"]
        torch.testing.assert_close(other.scalars["temperature"], expected)
        assert all(torch.equal(other.factors[name], value) for name, value in one.factors.items())
        assert torch.equal(other.offset, one.offset)
    alone = adapt(encoder, {**parameters, LOG_ADAPTED_FACTOR: factor}, support, replace(inner, steps=0))
    assert torch.equal(alone.scalars["temperature"], usual[0].scalars["temperature"])
