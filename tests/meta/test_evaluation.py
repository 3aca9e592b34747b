"""Scores of episodes, against scikit-learn, SciPy and plain loops."""

from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp, ttest_rel
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import AutoModel

from tests.conftest import WORDS, tiny_tokenizer
from tests.given import Patch
from tests.meta.given import CPU, make_learner
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import OUTSIDE, Episode, EpisodeSampler, EpisodeSettings
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import DataError, DivergedError, SettingsError
from textmeta.meta import evaluation
from textmeta.meta.batch import Rows, TaskBatch
from textmeta.meta.evaluation import EpisodeScores, frozen_prototypes, paired_difference, score_episodes, summary
from textmeta.meta.initialisation import LearnerSettings
from textmeta.meta.learner import TaskLearner


@pytest.fixture(scope="module")
def episodes(corpus: Corpus) -> list[Episode]:
    """Of 2 to 5 ways, from names alone to 4 examples a class; with unlabelled texts, and queries of no class."""
    sampler = EpisodeSampler(corpus, EpisodeSettings((2, 5), (1, 4), 3, label_names=0.4), seed=2)
    named = EpisodeSampler(corpus, EpisodeSettings(3, (0, 1), 3, label_names=1.0), seed=2)
    found = [known_names(episode) for episode in [*map(unequal, sampler.take(8)), *named.take(3)]]
    assert {0, 1, 4} <= {int(n) for e in found for n in np.bincount(e.support_labels, minlength=e.ways)}
    found[0] = replace(found[0], unlabelled_texts=tuple(corpus.texts[-4:]))
    found[1] = outside_first(found[1])
    return found


def known_names(episode: Episode) -> Episode:
    """The episode with names that the encoder knows: among others, which all read alike, rounding would choose."""
    words = tuple(WORDS[12 * int(name.removeprefix("class"))] for name in episode.class_names)
    return replace(episode, label_names=words) if episode.label_names else episode


def unequal(episode: Episode) -> Episode:
    """The episode with one example less of its first class, if that has more than one."""
    less = int(len(episode.support_texts) > episode.ways)
    return replace(episode, support_texts=episode.support_texts[less:], support_labels=episode.support_labels[less:])


def outside_first(episode: Episode) -> Episode:
    """The episode with two more queries in front, of no class of it."""
    texts, labels = ("bal bal", "fim fon", *episode.query_texts), [OUTSIDE, OUTSIDE, *episode.query_labels]
    return replace(episode, query_texts=texts, query_labels=np.array(labels))


def scores(accuracy: Sequence[float]) -> EpisodeScores:
    values = np.array(accuracy)
    return EpisodeScores(values, values, values, np.array([0.5]), np.array([True]))


@pytest.mark.parametrize("adapt", ["none", "pooling", "pooling+lora"])
def test_scores_are_those_of_scikit_learn(adapt: str, encoder64: Encoder, episodes: list[Episode]) -> None:
    """One episode at a time, scored by another library; queries of no class take no part."""
    learner = make_learner(encoder64, LearnerSettings((1, 3, 4), adapt, steps=2))  # type: ignore[arg-type]
    found = score_episodes(learner, episodes)
    confidence, correct = [], []
    for number, e in enumerate(episodes):
        own = e.query_labels != OUTSIDE
        queries = Rows.of([[text for text, kept in zip(e.query_texts, own, strict=True) if kept]], CPU)
        with torch.no_grad():
            logits = learner.answer(learner.learn(TaskBatch.of_episodes([e])), queries).logits[0]
        probabilities, labels = logits.softmax(1).numpy(), e.query_labels[own]
        predicted = probabilities.argmax(1)
        assert found.accuracy[number] == accuracy_score(labels, predicted)
        assert found.macro_f1[number] == f1_score(labels, predicted, average="macro")
        assert found.nll[number] == pytest.approx(log_loss(labels, probabilities, labels=range(e.ways)), rel=1e-6)
        confidence.append(probabilities.max(1))
        correct.append(predicted == labels)
    np.testing.assert_allclose(found.confidence, np.concatenate(confidence), rtol=1e-6)
    np.testing.assert_array_equal(found.correct, np.concatenate(correct))
    assert 0 < found.correct.mean() < 1


def test_scores_do_not_depend_on_the_parts(encoder64: Encoder, episodes: list[Episode], monkeypatch: Patch) -> None:
    learner = make_learner(encoder64, LearnerSettings((1, 3, 4), steps=2))
    together = score_episodes(learner, episodes)
    assert_equal(together, score_episodes(learner, episodes), exactly=True)
    for name, most, parts in (("TASKS_AT_ONCE", 1, 11), ("TEXTS_AT_ONCE", 60, 6), ("TEXTS_AT_ONCE", 0, 11)):
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, name, most)
            assert_equal(together, score_episodes(learner, episodes))
            assert len(list(evaluation.in_parts(episodes))) == parts


def assert_equal(one: EpisodeScores, two: EpisodeScores, exactly: bool = False) -> None:
    for name in ("accuracy", "macro_f1", "nll", "confidence", "correct"):
        np.testing.assert_allclose(
            getattr(one, name), getattr(two, name), rtol=0 if exactly else 1e-6, atol=0, err_msg=name
        )


@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_frozen_prototypes_are_nearest_class_means(
    layers: tuple[int, ...] | None, tiny_model: str, encoder: Encoder, episodes: list[Episode]
) -> None:
    """Of the mean token states of the last layer, as transformers gives them; names are examples."""
    model, tokenizer = AutoModel.from_pretrained(tiny_model).eval(), tiny_tokenizer()

    def features(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for text in texts:
            with torch.no_grad():
                ids = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
                rows.append(model(**ids).last_hidden_state[0].mean(0).double().numpy())
        return np.stack([row / np.linalg.norm(row) for row in rows])

    found = frozen_prototypes(TokenStateReader(encoder, layers), episodes)
    for number, e in enumerate(episodes):
        names = e.label_names or ()
        labels = np.array([*e.support_labels, *range(len(names))])
        support = features([*e.support_texts, *names])
        means = np.stack([support[labels == c].mean(0) for c in range(e.ways)])
        own = e.query_labels != OUTSIDE
        cosines = features(e.query_texts)[own] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
        assert found.accuracy[number] == np.mean(cosines.argmax(1) == e.query_labels[own])
        probabilities = torch.tensor(10 * cosines).softmax(1).numpy()
        expected = log_loss(e.query_labels[own], probabilities, labels=range(e.ways))
        assert found.nll[number] == pytest.approx(expected, rel=1e-4)


def test_intervals_are_students() -> None:
    after, before = scores([0.9, 0.7, 0.8, 1.0]), scores([0.6, 0.7, 0.6, 0.9])
    expected = ttest_rel(after.accuracy, before.accuracy).confidence_interval(0.95)
    paired = paired_difference(after, before)
    assert paired == pytest.approx({"difference": 0.15, "low": expected.low, "high": expected.high})
    found, alone = summary(after), ttest_1samp(after.accuracy, 0).confidence_interval(0.95)
    assert found["episodes"] == 4
    assert found["accuracy"] == pytest.approx(0.85)
    assert found["accuracy_ci95"] == pytest.approx((alone.high - alone.low) / 2)


def test_calibration_error_is_the_mean_gap_of_fifteen_bins() -> None:
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.uniform(0.2, 1, 500), [1.0, 1.0]])
    correct = rng.uniform(size=502) < 0.8 * confidence
    expected = 0.0
    for number in range(15):
        inside = (confidence >= number / 15) & ((confidence < (number + 1) / 15) | (number == 14))
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    found = summary(replace(scores([0.5, 1.0]), confidence=confidence, correct=correct))
    assert found["ece"] == pytest.approx(expected)
    assert found["ece"] > 0.1


def test_what_cannot_be_scored_is_an_error(encoder: Encoder, episodes: list[Episode]) -> None:
    reader = TokenStateReader(encoder)
    with pytest.raises(DataError, match="no episodes to score"):
        frozen_prototypes(reader, [])
    none = replace(episodes[2], query_labels=np.full(len(episodes[2].query_labels), OUTSIDE))
    with pytest.raises(DataError, match="'toy': an episode has no query of its classes"):
        frozen_prototypes(reader, [episodes[0], none])
    with pytest.raises(DataError, match="4 episodes with 3"):
        paired_difference(scores([1.0] * 4), scores([1.0] * 3))
    with pytest.raises(DataError, match="an interval needs at least 2 episodes, given 1"):
        summary(scores([1.0]))


def test_the_table_has_a_row_a_result() -> None:
    before, after = scores([0.25, 0.75, 0.5]), scores([0.5, 1.0, 0.75])
    results = {"frozen": summary(before), "adapter": {**summary(after), "paired": paired_difference(after, before)}}
    head, line, first, second = evaluation.format_table(results).splitlines()
    assert [cell.strip() for cell in head.split("|")][1:4] == ["accuracy", "macro-F1", "NLL"]
    assert set(line) == {"-", "+"}
    assert first.split(" | ")[:2] == ["frozen ", "50.00 ± 62.10"]
    assert second.split(" | ")[:3] == ["adapter", "75.00 ± 62.10", "75.00   "]
    assert second.endswith("+25.00 [+25.00, +25.00]")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (torch.linalg.LinAlgError("input is not positive-definite"), DivergedError, "no finite solution"),  # type: ignore[attr-defined]
        (MemoryError(), SettingsError, r"the memory is too small for \d+ texts"),
        (RuntimeError("The size of tensor a (3) must match"), RuntimeError, "must match"),
    ],
)
def test_errors_on_episodes_name_them(
    error: Exception, kind: type[Exception], said: str, episodes: list[Episode], encoder64: Encoder, monkeypatch: Patch
) -> None:
    learner = make_learner(encoder64, LearnerSettings((1, 3, 4), steps=2))

    monkeypatch.setattr(TaskLearner, "answer", Mock(side_effect=error))
    with pytest.raises(kind, match=said) as found:
        score_episodes(learner, episodes)
    if kind is RuntimeError:
        assert found.value.__cause__ is None
    else:
        assert str(found.value).startswith("scoring 8 episodes of toy: ")
