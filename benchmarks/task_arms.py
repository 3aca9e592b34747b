"""Training with a task embedding, and scoring with the true one, another task's, or none: the experiment's arms."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.meta import adaptation
from textmeta.meta.adaptation import TaskConditions, adaptation_path, embed_tasks, task_weights
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import frozen_features, query_batch, support_batch
from textmeta.meta.training import train
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder
from textmeta.model.heads import class_mask, cross_entropy_per_task
from textmeta.model.initialisation import Parameters
from textmeta.model.task_encoder import task_embedding, task_statistics

__all__ = ["ARMS", "INNER", "Scores", "score_arm", "swap", "task_conditions", "train_model"]

INNER = InnerLoopSettings(steps=3, adapt=("offset",))  # ANIL's
ARMS = ("true", "within", "between", "mean")
TASKS_AT_ONCE = 10
SHIFT = 17  # a task is given the embedding of the one so many places further on

# shots → corpus → episodes; corpus → their conditions; what a JSON line holds of an arm in one corpus
Episodes = Mapping[int, Mapping[str, Sequence[Episode]]]
Conditions = Mapping[tuple[int, str], TaskConditions]
Scores = dict[str, list[int]]


def train_model(
    encoder: Encoder,
    corpora: Sequence[Corpus],
    conditioning: ConditioningSettings | None,
    *,
    steps: int,
    seed: int,
    swapped: bool = False,
) -> tuple[Parameters, InnerLoopSettings]:
    """Meta-train with ANIL on episodes mixed from some corpora.

    Args:
        encoder: with its LoRA.
        corpora: restricted to their training classes.
        conditioning: what the task embedding decides; None for no task encoder.
        steps: outer steps, of 4 episodes with 2 to 8 ways, 1 to 5 shots and 5 queries a class.
        seed: of the start and the episodes.
        swapped: give every task the embedding of another in the same outer step.
    """
    episodes = EpisodeSettings((2, 8), (1, 5), 5, at_most=True)
    settings = TrainingSettings(
        "anil",
        steps=steps,
        tasks_per_step=4,
        warmup=min(20, steps // 4),
        validate_every=steps,
        validation_episodes=2,  # the last step is taken, whatever comes out
        checkpoint_every=steps,
        seed=seed,
    )
    samplers = [EpisodeSampler(corpora, episodes, seed + number) for number in (0, 1)]
    with tempfile.TemporaryDirectory() as folder, _swapped() if swapped else nullcontext():
        inner = replace(INNER, conditioning=conditioning)
        result = train(encoder, samplers[0], samplers[1], settings, inner, Path(folder))
    return result.parameters, result.inner


def task_conditions(
    encoder: Encoder, parameters: Parameters, inner: InnerLoopSettings, episodes: Episodes
) -> dict[tuple[int, str], TaskConditions]:
    """Return the embeddings of all tasks, by shots and corpus."""
    assert inner.conditioning is not None
    found = {}
    for shots, by_corpus in episodes.items():
        for corpus, part in by_corpus.items():
            tasks = frozen_features(encoder, part, "support")
            embedding = task_embedding(parameters, inner.conditioning.task_encoder, *tasks)
            found[shots, corpus] = TaskConditions(embedding, task_statistics(*tasks))
    return found


@torch.no_grad()
def score_arm(
    encoder: Encoder,
    parameters: Parameters,
    inner: InnerLoopSettings,
    episodes: Sequence[Episode],
    conditions: TaskConditions | None = None,
) -> dict[str, Scores]:
    """Return, for the start and after adaptation, each episode's right answers and its NLL in thousandths of a nat.

    Args:
        encoder: makes features.
        parameters: the initialisation.
        inner: without conditioning for the arm that has none.
        episodes: E of them.
        conditions: of E tasks, not necessarily these.
    """
    scores: dict[str, Scores] = {stage: {"right": [], "nll": []} for stage in ("start", "adapted")}
    for first in range(0, len(episodes), TASKS_AT_ONCE):
        part = episodes[first : first + TASKS_AT_ONCE]
        rows = slice(first, first + TASKS_AT_ONCE)
        own = conditions and TaskConditions(conditions.embedding[rows], conditions.statistics[rows])
        support, query = support_batch(encoder, part), query_batch(encoder, part)
        path = list(adaptation_path(encoder, parameters, support, inner, own))
        # ANIL's steps leave the features alone, so one forward of the queries serves the start and the end
        features = query.pad(encoder.features(query.texts, path[0].factors, query.row_task))
        for stage, adapted in (("start", path[0]), ("adapted", path[-1])):
            weights = task_weights(encoder, adapted, support)
            logits = adapted.head.logits(features, weights, adapted.scalars, class_mask(query.ways))
            counts = query.labels >= 0
            right = ((logits.argmax(-1) == query.labels) & counts).sum(1)
            nll = cross_entropy_per_task(logits, query.labels, counts)
            scores[stage]["right"] += right.tolist()
            scores[stage]["nll"] += (1000 * nll).round().int().tolist()
    return scores


def swap(conditions: Conditions, shots: int, corpus: str, arm: str) -> TaskConditions:
    """Return the conditions that an arm gives to the tasks of a corpus: their own, each other's, another corpus's."""
    own = conditions[shots, corpus]
    if arm == "within":
        return TaskConditions(own.embedding.roll(SHIFT, 0), own.statistics.roll(SHIFT, 0))
    if arm == "true":
        return own
    others = sorted({name for _, name in conditions} - {corpus})  # every task gets one of the next corpus's
    given = [conditions[shots, others[index % len(others)]] for index in range(len(own.embedding))]
    return TaskConditions(
        torch.stack([part.embedding[index] for index, part in enumerate(given)]),
        torch.stack([part.statistics[index] for index, part in enumerate(given)]),
    )


@contextmanager
def _swapped() -> Iterator[None]:
    """Let every task be conditioned on the embedding of another one that is taken in the same step."""

    def embed(*arguments: object) -> TaskConditions | None:
        own = embed_tasks(*arguments)  # type: ignore[arg-type]
        return own and TaskConditions(own.embedding.roll(1, 0), own.statistics.roll(1, 0))

    with patch.object(adaptation, "embed_tasks", embed):
        yield
