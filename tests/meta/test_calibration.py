"""The rule of the out-of-scope score, on token states made up so that what is in scope is known."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.token_states import TokenStates
from textmeta.errors import DataError
from textmeta.heads.scope import scope_probability
from textmeta.meta.adapter import Adapter
from textmeta.meta.calibration import fit_calibration
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner

WIDTH = 24


class Topics:
    """Reads a text "topic number": near the direction of its topic, or anywhere where topics mean nothing."""

    def __init__(self, meaning: bool = True) -> None:
        self.meaning = meaning

    def read(
        self, texts: Sequence[str], factors: Mapping[str, Tensor] | None = None, row_task: Tensor | None = None
    ) -> TokenStates:
        states = []
        for text in texts:
            topic, number = map(int, text.split())
            noise = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(1000 * topic + number))
            states.append(0.3 * noise + self.meaning * 3 * torch.eye(WIDTH)[topic])
        return TokenStates.padded(states)


def learner_of(reader: Topics) -> TaskLearner:
    settings = LearnerSettings((0,), "none", steps=1)
    initialisation = Initialisation.start({}, WIDTH, settings, seed=0)
    adapter = Adapter(EncoderSettings("topics"), "", LoraSettings(), settings, initialisation, torch.zeros(3, WIDTH))
    return TaskLearner(reader, adapter)


def episode_of(seed: int, ways: int = 4, inside: int = 8, outside: int = 8) -> Episode:
    """Two examples of each topic; queries of these topics, and of others."""
    rng = np.random.default_rng(seed)
    topics = rng.permutation(WIDTH)
    labels = np.concatenate([rng.integers(0, ways, inside), np.full(outside, OUTSIDE)])
    asked = [topics[label] if label != OUTSIDE else topics[rng.integers(ways, WIDTH)] for label in labels]
    return Episode(
        corpus="topics",
        class_names=tuple(map(str, topics[:ways])),
        support_texts=tuple(f"{topic} {seed * 100 + i}" for topic in topics[:ways] for i in range(2)),
        support_labels=np.repeat(np.arange(ways), 2),
        query_texts=tuple(f"{topic} {seed * 100 + 10 + i}" for i, topic in enumerate(asked)),
        query_labels=labels,
    )


def probabilities(learner: TaskLearner, rule: Tensor, episode: Episode) -> np.ndarray:
    with torch.no_grad():
        answers = learner.answer_episodes([episode])
    return scope_probability(rule, answers.scope_inputs)[0].numpy()


def test_the_rule_separates_inside_from_outside_in_new_tasks() -> None:
    learner = learner_of(Topics())
    rule = fit_calibration(learner, [episode_of(seed, ways=2 + seed % 5) for seed in range(40)])
    assert rule.shape == (8,)
    for seed in range(100, 110):
        episode = episode_of(seed)
        found = probabilities(learner, rule, episode)
        assert ((found > 0.5) == (episode.query_labels != OUTSIDE)).all()


def test_both_kinds_weigh_alike_however_many_there_are() -> None:
    """Where nothing can be told, a text is as likely in scope as out of it."""
    learner = learner_of(Topics(meaning=False))
    rule = fit_calibration(learner, [episode_of(seed, inside=20, outside=2) for seed in range(60)])
    found = np.concatenate([probabilities(learner, rule, episode_of(seed)) for seed in range(100, 110)])
    assert 0.35 < found.mean() < 0.65


@pytest.mark.parametrize(("inside", "outside", "episodes"), [(4, 0, 3), (0, 4, 3), (4, 4, 0)])
def test_it_needs_both_kinds(inside: int, outside: int, episodes: int) -> None:
    given = [episode_of(seed, inside=inside, outside=outside) for seed in range(episodes)]
    with pytest.raises(DataError, match=f"given {len(given) * (inside + outside)} of one kind"):
        fit_calibration(learner_of(Topics()), given)
