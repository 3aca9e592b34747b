"""Contrastive and balance losses against their formulas, and that the task encoder learns by them alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import WORDS
from tests.meta.test_adaptation import named
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.errors import SettingsError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.self_supervision import (
    SelfSupervisionSettings,
    balance_loss,
    contrastive_loss,
    self_supervised_gradient,
    train_task_encoder,
)
from textmeta.meta.tasks import frozen_features, frozen_names, support_batch
from textmeta.model.conditioning import BANK, KEYS, ConditioningSettings
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import LORA
from textmeta.model.task_encoder import TASK_ENCODER, TaskEncoderSettings, task_embedding

INNER = InnerLoopSettings(
    conditioning=ConditioningSettings("banks", task_encoder=TaskEncoderSettings(size=16, width=16))
)


def rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=1)


def test_the_contrastive_loss_is_infonce_both_ways() -> None:
    one, two = rows(0), rows(1)
    scores = 3 * one.double().numpy() @ two.double().numpy().T
    there = [np.log(np.exp(scores[i]).sum()) - scores[i, i] for i in range(5)]
    back = [np.log(np.exp(scores[:, i]).sum()) - scores[i, i] for i in range(5)]
    assert float(contrastive_loss(one, two, 3.0)) == pytest.approx(np.mean(there + back), rel=1e-5)


def test_pairs_that_belong_together_count_neither_way() -> None:
    one, two = rows(0), rows(1)
    same = torch.eye(5, dtype=torch.bool)
    same[0, 3] = same[3, 0] = True
    scores = 3 * one.double().numpy() @ two.double().numpy().T
    scores[0, 3] = scores[3, 0] = -np.inf
    there = [np.log(np.exp(scores[i]).sum()) - scores[i, i] for i in range(5)]
    back = [np.log(np.exp(scores[:, i]).sum()) - scores[i, i] for i in range(5)]
    assert float(contrastive_loss(one, two, 3.0, same)) == pytest.approx(np.mean(there + back), rel=1e-5)


def test_the_balance_loss_is_0_for_even_use_and_log_k_for_one_bank() -> None:
    even = torch.eye(4).repeat(3, 1)[:, None]  # each task decided, all banks used as often
    assert float(balance_loss(even)) == pytest.approx(0, abs=1e-6)
    one = torch.zeros(6, 2, 4)
    one[..., 1] = 1
    assert float(balance_loss(one)) == pytest.approx(np.log(4), rel=1e-6)


def test_what_has_a_gradient(encoder: Encoder, sampler: EpisodeSampler) -> None:
    parameters = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size)
    found = self_supervised_gradient(encoder, parameters, sampler.take(6), INNER, SelfSupervisionSettings())
    assert all(value.any() for value in found.values())
    assert KEYS in found
    assert {name for name in parameters if name.startswith(TASK_ENCODER)} <= set(found)
    assert not any(name.startswith((LORA, BANK)) for name in found)
    unbalanced = SelfSupervisionSettings(balance=0.0)
    assert not self_supervised_gradient(encoder, parameters, sampler.take(6), INNER, unbalanced)[KEYS].any()


def test_a_task_drawn_twice_is_no_stranger_to_itself(encoder: Encoder, sampler: EpisodeSampler) -> None:
    """The gradient with a task twice has no part that pushes its two pairs of draws apart."""
    parameters = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size)
    one, other = sampler.take(2)
    supervision = SelfSupervisionSettings(balance=0.0)
    alone = self_supervised_gradient(encoder, parameters, [one, one], INNER, supervision)
    assert alone[TASK_ENCODER + "class"].any()  # its classes are strangers to each other
    task = TASK_ENCODER + "task"  # which only the task's own loss reaches
    assert not alone[task].any()
    assert self_supervised_gradient(encoder, parameters, [one, other], INNER, supervision)[task].any()


def test_names_teach_those_that_can_see_them(encoder: Encoder, sampler: EpisodeSampler) -> None:
    assert INNER.conditioning is not None
    task_encoder = replace(INNER.conditioning.task_encoder, label_names=True)
    inner = replace(INNER, conditioning=replace(INNER.conditioning, task_encoder=task_encoder))
    parameters = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    found = self_supervised_gradient(encoder, parameters, sampler.take(6), inner, SelfSupervisionSettings())
    assert found[TASK_ENCODER + "name"].any()
    assert frozen_names(encoder, sampler.take(6)).shape == (6, 3, encoder.hidden_size)


def test_a_name_stands_for_the_examples_of_a_class_without(encoder: Encoder, corpus: Corpus) -> None:
    settings = EpisodeSettings(4, (0, 2), 2, unbalanced=True, label_names=1.0)
    episodes = [named(e) for e in EpisodeSampler(corpus, settings, 0).take(6)]
    features, labels, ways = frozen_features(encoder, episodes, "support")
    support = support_batch(encoder, episodes)
    rows = support.pad(encoder.frozen_features(support.texts.texts))
    assert ways.tolist() == [4] * 6
    for task, e in enumerate(episodes):
        assert e.label_names is not None
        counts = np.bincount(e.support_labels, minlength=4)
        missing = [c for c in range(4) if not counts[c]]
        assert [label for label in labels[task].tolist() if label >= 0] == [*e.support_labels, *missing]
        names = encoder.frozen_features([e.label_names[c] for c in missing]) if missing else torch.empty(0, 32)
        given = len(e.support_texts)
        torch.testing.assert_close(features[task, given : given + len(missing)], names)
        for c in range(4):  # adaptation sees the same
            same = rows[task, support.class_labels[task] == c].sum(0)
            torch.testing.assert_close(features[task, labels[task] == c].sum(0), same)
    zero = EpisodeSampler(corpus, replace(settings, shots=0), 0).take(4)
    start = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size)
    for batch in (episodes, [named(e) for e in zero]):
        found = self_supervised_gradient(encoder, start, batch, INNER, SelfSupervisionSettings())
        assert all(part.isfinite().all() for part in found.values())
        assert any(part.any() for part in found.values())


def test_a_task_encoder_learns_to_know_a_task_again(
    encoder: Encoder, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the toy texts' words a few are their class's own: with vectors of words as features there is much to learn."""
    generator = torch.Generator().manual_seed(0)
    vectors = {word: torch.randn(encoder.hidden_size, generator=generator) for word in WORDS}

    def sums(texts: list[str]) -> torch.Tensor:
        rows = torch.stack([torch.stack([vectors[word] for word in text.split()]).sum(0) for text in texts])
        return torch.nn.functional.normalize(rows, dim=1)

    monkeypatch.setattr(encoder, "frozen_features", sums)
    settings = EpisodeSettings((2, 4), (1, 4), 4)
    new = EpisodeSampler(corpus, EpisodeSettings(2, 4, 4), seed=9).take(40)
    start = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size)

    def loss(parameters: dict) -> float:
        assert INNER.conditioning is not None
        draws = [
            task_embedding(parameters, INNER.conditioning.task_encoder, *frozen_features(encoder, new, part))
            for part in ("support", "query")
        ]
        return float(contrastive_loss(draws[0], draws[1], 10.0))

    supervision = SelfSupervisionSettings(episodes=8)
    episodes = EpisodeSampler(corpus, settings, 0)
    learned = train_task_encoder(encoder, start, episodes, INNER, supervision, steps=40, learning_rate=3e-3)
    assert loss(learned) < 0.8 * loss(start)
    again = train_task_encoder(encoder, start, episodes, INNER, supervision, steps=40, learning_rate=3e-3)
    assert all(torch.equal(value, again[name]) for name, value in learned.items())
    assert all(torch.equal(value, learned[name]) for name, value in start.items() if name.startswith((LORA, BANK)))


@pytest.mark.parametrize(
    "given", [{"episodes": 1}, {"contrastive": -1.0}, {"contrast": 0.0}, {"balance": float("nan")}]
)
def test_settings_out_of_range(given: dict) -> None:
    with pytest.raises(SettingsError, match=next(iter(given))):
        SelfSupervisionSettings(**given)
