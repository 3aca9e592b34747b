"""Strengths of LoRA that each task chooses from, and temperatures that depend on a task's size."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.meta.test_adaptation import INNER, moved_parameters, named, support_loss
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.errors import SettingsError
from textmeta.meta.adaptation import (
    AdaptedParameters,
    adapt,
    query_logits,
    start_parameters,
    task_scalars,
    task_weights,
)
from textmeta.meta.adapted import support_log_likelihood
from textmeta.meta.evaluation import score_episodes
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import query_batch, support_batch
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import (
    EVIDENCE_SLOPES,
    LORA,
    STRENGTH_PRIOR,
    TEMPERATURE_SLOPES,
    Parameters,
    lora_factors,
)

STRENGTHS = (0.0, 0.5, 1.0, 2.0)
PRIOR = torch.tensor([0.0, 0.3, 1.0, -0.5])
CHOOSING = replace(INNER, strengths=STRENGTHS)


def choosing_parameters(encoder: Encoder, inner: InnerLoopSettings = CHOOSING) -> Parameters:
    return {**moved_parameters(encoder, inner), STRENGTH_PRIOR: PRIOR}


def scaled(factors: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    return {name: strength * value if "lora_B" in name else value for name, value in factors.items()}


def mixed_episodes(corpus: Corpus) -> list[Episode]:
    """Tasks of different sizes, some with names, some of 1 shot."""
    settings = EpisodeSettings((2, 5), (1, 4), 4)
    episodes = EpisodeSampler(corpus, settings, seed=4).take(10)
    assert {len(e.support_labels) // e.ways for e in episodes} >= {1, 3}
    return [named(e) if number % 3 == 1 else e for number, e in enumerate(episodes)]


def answer(encoder: Encoder, parameters: Parameters, e: Episode, inner: InnerLoopSettings) -> Tensor:
    """Return the (q, C) logits of one task alone."""
    support, query = support_batch(encoder, [e]), query_batch(encoder, [e])
    with torch.no_grad():
        adapted = adapt(encoder, parameters, support, inner)
        return query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)[0]


def factors_of(adapted: AdaptedParameters, task: int = 0) -> dict[str, Tensor]:
    return {name: value[task] if value.ndim == 3 else value for name, value in adapted.factors.items()}


@pytest.mark.parametrize("steps", [0, 2])
def test_the_choice_is_that_of_a_loop(steps: int, encoder: Encoder, corpus: Corpus) -> None:
    """Over adapters with scaled B, each scored example by example (:func:`support_loss`); then the steps."""
    inner = replace(CHOOSING, steps=steps)
    parameters, chosen = choosing_parameters(encoder, inner), set()
    for e in mixed_episodes(corpus):
        support, offset = support_batch(encoder, [e]), torch.zeros(e.ways, encoder.hidden_size)
        labels = [*e.support_labels, *(range(e.ways) if e.label_names else ())]
        company = sum(labels.count(label) > 1 for label in e.support_labels)
        scores = []
        for strength, prior in zip(STRENGTHS, PRIOR, strict=True):
            factors = scaled(lora_factors(parameters), strength)
            loss = support_loss(encoder, parameters, factors, offset, e) if company else torch.zeros(())
            scores.append(prior - company * loss)
        best = int(torch.stack(scores).argmax())
        start = {LORA + name: value for name, value in scaled(lora_factors(parameters), STRENGTHS[best]).items()}
        expected = adapt(encoder, {**parameters, **start}, support, replace(inner, strengths=(1.0,)))
        found = adapt(encoder, parameters, support, inner)
        for name, value in factors_of(expected).items():
            torch.testing.assert_close(factors_of(found)[name], value)
        torch.testing.assert_close(found.offset, expected.offset)
        chosen.add(best)
    assert len(chosen) >= 3, "otherwise nothing was chosen here"


@pytest.mark.parametrize("favourite", range(len(STRENGTHS)))
def test_where_nothing_can_be_told_the_prior_decides(favourite: int, encoder: Encoder, corpus: Corpus) -> None:
    """Examples alone in their classes."""
    prior = torch.where(torch.arange(len(STRENGTHS)) == favourite, 1e-3, 0.0)
    parameters = {**choosing_parameters(encoder), STRENGTH_PRIOR: prior}
    one_shot = EpisodeSampler(corpus, EpisodeSettings(4, 1, 2), seed=0).take(3)
    found = factors_of(adapt(encoder, parameters, support_batch(encoder, one_shot), CHOOSING))
    for name, value in scaled(lora_factors(parameters), STRENGTHS[favourite]).items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("head", ["prototype", "readout"])
@pytest.mark.parametrize("steps", [0, 2])
def test_tasks_together_choose_as_alone(steps: int, head: Any, encoder: Encoder, corpus: Corpus) -> None:
    inner = replace(CHOOSING, steps=steps, head=head)
    parameters, episodes = choosing_parameters(encoder, inner), mixed_episodes(corpus)[:9]
    support, query = support_batch(encoder, episodes), query_batch(encoder, episodes)
    with torch.no_grad():
        adapted = adapt(encoder, parameters, support, inner)
        together = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)
    assert any(value.ndim == 3 for value in adapted.factors.values()), "they differ"
    for number, e in enumerate(episodes):
        found = together[number, : len(e.query_labels), : e.ways]
        torch.testing.assert_close(found, answer(encoder, parameters, e, inner), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", ["prototype", "readout"])
@pytest.mark.parametrize("steps", [0, 2])
def test_evaluation_chooses_as_fit_does(steps: int, head: Any, encoder: Encoder, corpus: Corpus) -> None:
    inner = replace(CHOOSING, steps=steps, head=head)
    parameters = {**choosing_parameters(encoder, inner), TEMPERATURE_SLOPES: torch.tensor([0.3, -0.2])}
    parameters[EVIDENCE_SLOPES] = torch.tensor([-0.4, 1.5])
    episodes = mixed_episodes(corpus)
    found = score_episodes(encoder, parameters, episodes, inner)
    for number, e in enumerate(episodes):
        probabilities = answer(encoder, parameters, e, inner).double().softmax(1).numpy()
        own = probabilities[np.arange(len(e.query_labels)), e.query_labels]
        assert found.nll[number] == pytest.approx(-np.log(own).mean(), rel=1e-3)
        assert found.accuracy[number] == (probabilities.argmax(1) == e.query_labels).mean()
    parameters[STRENGTH_PRIOR] = torch.zeros(1)
    one = score_episodes(encoder, parameters, episodes, replace(inner, strengths=(1.0,)))
    assert not np.allclose(one.nll, found.nll, rtol=1e-3), "the choice matters"


def test_strength_0_is_the_frozen_encoder(encoder: Encoder, sampler: EpisodeSampler) -> None:
    e, inner = sampler[0], replace(INNER, steps=0)
    parameters = moved_parameters(encoder, inner)
    frozen = {name: 0 * value if name.startswith(LORA) else value for name, value in parameters.items()}
    found = answer(encoder, parameters, e, replace(inner, strengths=(0.0,)))
    assert torch.equal(found, answer(encoder, frozen, e, inner))
    assert not torch.allclose(found, answer(encoder, parameters, e, inner), atol=1e-2)


def test_one_strength_of_1_costs_nothing(
    encoder: Encoder, sampler: EpisodeSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before there were strengths: no forward of the support set without steps, and the same tensors."""
    parameters, inner = moved_parameters(encoder), replace(INNER, steps=0)
    support = support_batch(encoder, sampler.take(2))
    monkeypatch.setattr(Encoder, "features", lambda *_: pytest.fail("a forward"))
    adapted = adapt(encoder, parameters, support, inner)
    assert all(torch.equal(adapted.factors[name], value) for name, value in lora_factors(parameters).items())


@pytest.mark.parametrize("strengths", [(), (-0.1,), (1.0, 10.1), (math.nan,), (math.inf,), (1.0,) * 17])
def test_unusable_strengths_are_named(strengths: tuple[float, ...]) -> None:
    with pytest.raises(SettingsError, match=r"inner strengths must be 1 to 16 numbers from 0 to 10, given \("):
        InnerLoopSettings(strengths=strengths)
    assert InnerLoopSettings(strengths=(0.0, 10.0)).strengths == (0.0, 10.0)


def test_the_prior_has_an_entry_a_strength(encoder: Encoder) -> None:
    assert start_parameters(encoder.factor_shapes, CHOOSING, 32)[STRENGTH_PRIOR].tolist() == [0.0] * 4
    assert start_parameters(encoder.factor_shapes, INNER, 32)[STRENGTH_PRIOR].tolist() == [0.0]


# Temperatures


def test_temperature_is_the_formula(encoder: Encoder, corpus: Corpus) -> None:
    """log t = log t_0 + s · (mean over classes of log shots, log (ways / 5)); a name is a shot, and 0 shots are 1."""
    settings = EpisodeSettings((2, 6), (0, 4), 2, unbalanced=True, label_names=1.0)
    episodes = EpisodeSampler(corpus, settings, seed=2).take(6)
    episodes = [*map(named, episodes), *EpisodeSampler(corpus, EpisodeSettings((2, 6), (1, 4), 2), seed=2).take(3)]
    slopes = torch.tensor([0.4, -0.7])
    parameters = {**moved_parameters(encoder), TEMPERATURE_SLOPES: slopes}
    expected = []
    for e in episodes:
        counts = [int((e.support_labels == c).sum()) + bool(e.label_names) for c in range(e.ways)]
        shots = sum(math.log(max(count, 1)) for count in counts) / e.ways
        expected.append(10 * math.exp(0.4 * shots - 0.7 * math.log(e.ways / 5)))
    found = task_scalars(parameters, support_batch(encoder, episodes))["temperature"]
    torch.testing.assert_close(found, torch.tensor(expected))
    for e, temperature in zip(episodes, expected, strict=True):
        usual = {**parameters, TEMPERATURE_SLOPES: torch.zeros(2), "log_temperature": torch.tensor(temperature).log()}
        logits = answer(encoder, parameters, e, replace(INNER, steps=0))
        torch.testing.assert_close(logits, answer(encoder, usual, e, replace(INNER, steps=0)))


def test_slopes_of_0_change_no_bit(encoder: Encoder, corpus: Corpus) -> None:
    parameters, support = moved_parameters(encoder), support_batch(encoder, mixed_episodes(corpus))
    found = task_scalars(parameters, support)["temperature"]
    assert torch.equal(found, parameters["log_temperature"].exp().expand(len(support.ways)))


def test_the_temperature_is_learned_and_its_slopes_are_not(encoder: Encoder, sampler: EpisodeSampler) -> None:
    parameters = {**moved_parameters(encoder), TEMPERATURE_SLOPES: torch.tensor([0.4, -0.7])}
    parameters = {name: value.requires_grad_() for name, value in parameters.items()}
    found = task_scalars(parameters, support_batch(encoder, sampler.take(2)))["temperature"].sum()
    one, two = torch.autograd.grad(
        found, [parameters["log_temperature"], parameters[TEMPERATURE_SLOPES]], allow_unused=True
    )
    torch.testing.assert_close(one, found.detach())
    assert two is None


def counted_evidence(encoder: Encoder, parameters: Parameters, inner: InnerLoopSettings, e: Episode) -> list[float]:
    """Return r and r · a of a task, from the answers of its own support set with one example less."""
    labels = [*e.support_labels, *(range(e.ways) if e.label_names else ())]
    right = []
    for row, label in enumerate(e.support_labels):
        if labels.count(label) < 2:
            continue
        kept = np.arange(len(e.support_labels)) != row
        texts = tuple(text for text, keep in zip(e.support_texts, kept, strict=True) if keep)
        without = replace(
            e,
            support_texts=texts,
            support_labels=e.support_labels[kept],
            query_texts=e.support_texts[row : row + 1],
            query_labels=e.support_labels[row : row + 1],
        )
        right.append(int(answer(encoder, parameters, without, inner).argmax()) == label)
    share, accuracy = len(right) / (len(right) + 10), np.mean(right or [0])
    return [share, share * (accuracy - 1 / e.ways) / (1 - 1 / e.ways)]


@pytest.mark.parametrize("steps", [0, 2])
def test_temperature_grows_with_the_evidence(steps: int, encoder: Encoder, corpus: Corpus) -> None:
    """Of the support set before the steps, every example told by a task without it."""
    inner = replace(INNER, steps=steps)
    parameters, told = moved_parameters(encoder, inner), set()
    slopes = torch.tensor([-0.4, 1.5])
    for e in mixed_episodes(corpus)[:6]:
        found = counted_evidence(encoder, parameters, replace(inner, steps=0), e)
        temperature = 10 * math.exp(torch.tensor(found).float() @ slopes)
        support = support_batch(encoder, [e])
        with torch.no_grad():
            adapted = adapt(encoder, {**parameters, EVIDENCE_SLOPES: slopes}, support, inner)
        assert float(adapted.scalars["temperature"]) == pytest.approx(temperature, rel=1e-4)
        told.add(round(found[1], 3))
    assert len(told) > 2


def test_each_strength_is_judged_at_its_own_temperature(encoder: Encoder, corpus: Corpus) -> None:
    inner, slopes = replace(CHOOSING, steps=0), torch.tensor([-1.0, 3.0])
    parameters, other = {**choosing_parameters(encoder, inner), EVIDENCE_SLOPES: slopes}, 0
    for e in mixed_episodes(corpus):
        support, scores = support_batch(encoder, [e]), []
        with torch.no_grad():
            found = adapt(encoder, parameters, support, inner)
            for strength, prior in zip(STRENGTHS, PRIOR, strict=True):
                start = {LORA + n: v for n, v in scaled(lora_factors(parameters), strength).items()}
                start[STRENGTH_PRIOR] = torch.zeros(1)
                one = adapt(encoder, {**parameters, **start}, support, replace(inner, strengths=(1.0,)))
                assert one.support_features is not None
                scores.append((prior + support_log_likelihood(one, one.support_features, support), one))
            best = max(scores, key=lambda pair: float(pair[0]))[1]
            plain = adapt(encoder, {**parameters, EVIDENCE_SLOPES: torch.zeros(2)}, support, inner)
        for name, value in factors_of(best).items():
            torch.testing.assert_close(factors_of(found)[name], value)
        torch.testing.assert_close(found.scalars["temperature"], best.scalars["temperature"])
        other += any(not torch.equal(factors_of(plain)[n], v) for n, v in factors_of(found).items())
    assert other, "otherwise nothing was told apart"
