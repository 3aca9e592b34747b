from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss

from tests.meta.test_adaptation import INNER, moved_parameters, named
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.errors import DataError
from textmeta.meta.adaptation import adapt, query_logits, task_weights
from textmeta.meta.evaluation import (
    EpisodeScores,
    compare_with_frozen,
    expected_calibration_error,
    format_table,
    frozen_prototypes,
    paired_difference,
    score_episodes,
    summary,
)
from textmeta.meta.tasks import query_batch, support_batch
from textmeta.model.encoder import Encoder
from textmeta.model.lora import zero_start


def scores(accuracy: list[float]) -> EpisodeScores:
    values = np.array(accuracy)
    return EpisodeScores(values, values, values, np.array([0.5]), np.array([True]))


@pytest.mark.parametrize("steps", [0, 2])
def test_scores_are_those_of_scikit_learn(steps: int, encoder: Encoder, corpus: Corpus) -> None:
    """One episode at a time through the inner loop, scored by another library; steps and no steps in one call."""
    episodes = EpisodeSampler(corpus, EpisodeSettings((2, 5), (1, 3), 4), seed=2).take(11)
    assert len({np.bincount(e.support_labels).max() for e in episodes} & {1, 2, 3}) > 1
    few = EpisodeSettings((2, 5), (0, 1), 4, label_names=1.0)  # names alone take no steps, one example with one does
    episodes += map(named, [*episodes[:4], *EpisodeSampler(corpus, few, seed=2).take(6)])
    assert {len(e.support_labels) // e.ways for e in episodes[-6:]} == {0, 1}
    parameters, inner = moved_parameters(encoder), replace(INNER, steps=steps)
    found = score_episodes(encoder, parameters, episodes, inner)
    for number, e in enumerate(episodes):
        support, query = support_batch(encoder, [e]), query_batch(encoder, [e])
        with torch.no_grad():
            adapted = adapt(encoder, parameters, support, inner)
            logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)[0]
        probabilities = logits.double().softmax(1).numpy()
        predicted = probabilities.argmax(1)
        assert found.accuracy[number] == accuracy_score(e.query_labels, predicted)
        assert found.macro_f1[number] == f1_score(e.query_labels, predicted, average="macro")
        assert found.nll[number] == pytest.approx(log_loss(e.query_labels, probabilities), rel=1e-3)


def test_frozen_prototypes_are_nearest_class_means(encoder: Encoder, sampler: EpisodeSampler) -> None:
    episodes = sampler.take(5)
    found = frozen_prototypes(encoder, episodes)
    start = zero_start(encoder.factor_shapes, seed=0)
    for number, e in enumerate(episodes):
        support, query = (encoder.features(encoder.prepare(t), start).numpy() for t in (e.support_texts, e.query_texts))
        means = np.stack([support[e.support_labels == c].mean(0) for c in range(e.ways)])
        cosines = query @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
        assert found.accuracy[number] == np.mean(cosines.argmax(1) == e.query_labels)


def test_names_go_into_the_baseline_too(encoder: Encoder, corpus: Corpus) -> None:
    """As one example more each, and alone where there is no other."""
    settings = EpisodeSettings(3, (0, 2), 4, unbalanced=True, label_names=1.0)
    episodes = [named(e) for e in EpisodeSampler(corpus, settings, seed=0).take(5)]
    found = frozen_prototypes(encoder, episodes)
    start = zero_start(encoder.factor_shapes, seed=0)
    for number, e in enumerate(episodes):
        assert e.label_names is not None
        texts = ([*e.support_texts, *e.label_names], e.query_texts)
        support, query = (encoder.features(encoder.prepare(part), start).numpy() for part in texts)
        labels = np.array([*e.support_labels, *range(e.ways)])
        means = np.stack([support[labels == c].mean(0) for c in range(e.ways)])
        cosines = query @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
        assert found.accuracy[number] == np.mean(cosines.argmax(1) == e.query_labels)
    without = frozen_prototypes(encoder, [replace(e, label_names=None) for e in episodes if e.support_texts])
    assert not np.allclose(without.nll, [nll for nll, e in zip(found.nll, episodes, strict=True) if e.support_texts])
    zero = [named(e) for e in EpisodeSampler(corpus, replace(settings, shots=0), seed=0).take(3)]
    result = compare_with_frozen(encoder, moved_parameters(encoder), zero, INNER)
    assert np.isfinite([result["frozen"]["nll"], result["meta_trained"]["nll"]]).all()


def test_intervals() -> None:
    after, before = scores([0.9, 0.7, 0.8, 1.0]), scores([0.6, 0.7, 0.6, 0.9])
    paired = paired_difference(after, before)
    difference = np.array([0.3, 0.0, 0.2, 0.1])
    half = 1.96 * difference.std(ddof=1) / 2
    assert paired["difference"] == pytest.approx(0.15)
    assert paired["low"] == pytest.approx(0.15 - half, abs=1e-4)
    assert paired["high"] == pytest.approx(0.15 + half, abs=1e-4)
    assert summary(after)["accuracy_ci95"] == pytest.approx(1.96 * after.accuracy.std(ddof=1) / 2, abs=1e-4)
    with pytest.raises(DataError, match="4 episodes with 3"):
        paired_difference(after, scores([1.0, 1.0, 1.0]))


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, True, True, False, True, False])
    assert expected_calibration_error(confidence, correct) == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.05)
    assert expected_calibration_error(np.array([1.0]), np.array([True])) == 0


def test_the_table_has_a_row_a_setting(encoder: Encoder, sampler: EpisodeSampler) -> None:
    result = compare_with_frozen(encoder, moved_parameters(encoder), sampler.take(6), INNER)
    table = format_table({"3-way 3-shot": result})
    assert "3-way 3-shot" in table
    assert f"{100 * result['meta_trained']['accuracy']:.2f} ±" in table
    assert len(table.splitlines()) == 3
