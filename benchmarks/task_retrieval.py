"""Do two draws of the same classes find each other, and does nearness of two tasks say what one does for the other?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from task_corpora import Corpora, episodes_of
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.data.labels import readable_name
from textmeta.meta.adaptation import adapt, query_logits, start_parameters, task_weights
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.self_supervision import SelfSupervisionSettings, train_task_encoder
from textmeta.meta.tasks import frozen_features, query_batch, support_and_query_batch, support_batch
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder
from textmeta.model.heads import cross_entropy_per_task
from textmeta.model.initialisation import Parameters
from textmeta.model.task_encoder import class_moments, class_vectors, task_embedding
from textmeta.tasks import TaskEmbedding, similarity

__all__ = ["retrieval", "transfer"]

INNER = InnerLoopSettings(conditioning=ConditioningSettings("none"))
TASKS = 200
FITTED = InnerLoopSettings(steps=10, adapt=("lora_B",))  # what the source task's adapter is fitted by
Drawn = tuple[Tensor, Tensor, Tensor]  # features (T, n, d), labels (T, n), ways (T,)


def retrieval(encoder: Encoder, corpora: Corpora, seed: int, quick: bool) -> dict[str, Any]:
    """Return, by corpus and shots, at which rank each of 200 tasks finds its other draw, for every way of looking.

    The task encoder is trained by self-supervision alone, on the training classes; the tasks are of other classes.
    """
    parameters = trained_task_encoder(encoder, corpora, seed, quick)
    axis = _main_axis(encoder, corpora)
    found: dict[str, Any] = {}
    for name, corpus in corpora.test.items():
        for shots in (1, 5):
            episodes = _distinct_tasks(corpus, shots)
            if len(episodes) < TASKS:
                continue  # of few classes there are not so many tasks
            draws = [frozen_features(encoder, episodes, part) for part in ("support", "query")]
            found[f"{name} {shots}"] = {
                way: _ranks(scores) for way, scores in _scores(encoder, parameters, episodes, draws, axis).items()
            }
    return found


def transfer(encoder: Encoder, corpora: Corpora, quick: bool) -> dict[str, Any]:
    """Return, for pairs of tasks, how near they are and how much the adapter fitted on one lowers the NLL of the other.

    An adapter is fitted by 10 inner steps on B from the start without any learning, on all texts of the source task;
    the target's prototypes and queries then go through it, and through the encoder as it is.
    """
    parameters = trained_task_encoder(encoder, corpora, 0, quick)
    count = 2 if quick else 4
    # sources and targets share no text, or an adapter would have been fitted to what it is then judged by
    sources, episodes = (
        [e for part in episodes_of(half, 5, count, seed=12).values() for e in part] for half in _halves(corpora.test)
    )
    drawn = [[frozen_features(encoder, [episode], "support") for episode in half] for half in (sources, episodes)]
    embedded = [[_embedded(parameters, one)[0] for one in half] for half in drawn]
    means = [_directions(half) for half in drawn]
    start = start_parameters(encoder.factor_shapes, FITTED, encoder.hidden_size)
    before = _nll(encoder, start, episodes)
    rows = []
    for source in tqdm(range(len(episodes)), desc="sources", unit="task", leave=False):
        with torch.no_grad():
            adapted = adapt(encoder, start, support_and_query_batch(encoder, [sources[source]]), FITTED)
        moved = {f"lora.{name}": value[0] if value.ndim == 3 else value for name, value in adapted.factors.items()}
        after = _nll(encoder, {**start, **moved}, episodes)
        for target in range(len(episodes)):
            near = {
                "similarity": similarity(embedded[0][source], embedded[1][target]),
                "task embedding": float(embedded[0][source].vector @ embedded[1][target].vector),
                "mean feature": float(means[0][source] @ means[1][target]),
            }
            gain = round(float(before[target] - after[target]), 4)
            rows.append([source, target, gain, *(round(value, 4) for value in near.values())])
    return {"corpora": [episode.corpus for episode in episodes], "columns": list(near), "pairs": rows}


def trained_task_encoder(encoder: Encoder, corpora: Corpora, seed: int, quick: bool) -> Parameters:
    """Return a task encoder that only the contrastive losses have taught, on training classes."""
    settings = EpisodeSettings((2, 8), (1, 5), 5, at_most=True)
    episodes = EpisodeSampler(list(corpora.train.values()), settings, seed)
    start = start_parameters(encoder.factor_shapes, INNER, encoder.hidden_size, seed)
    steps = 50 if quick else 500
    return train_task_encoder(encoder, start, episodes, INNER, SelfSupervisionSettings(), steps=steps)


def _halves(corpora: dict[str, Corpus]) -> list[dict[str, Corpus]]:
    """Return the corpora twice, each with every other text of each class."""
    halves: list[dict[str, Corpus]] = []
    for first in (0, 1):
        half = {}
        for name, corpus in corpora.items():
            rows = np.concatenate([corpus.rows_of(index)[first::2] for index in range(len(corpus.class_names))])
            texts = [corpus.texts[row] for row in rows]
            half[name] = Corpus(name, texts, corpus.labels[rows], corpus.class_names)
        halves.append(half)
    return halves


def _distinct_tasks(corpus: Corpus, shots: int) -> list[Episode]:
    """Return 200 episodes of 5 ways whose class sets differ, with as many queries as shots: the other draw."""
    sampler = EpisodeSampler(corpus, EpisodeSettings(5, shots, shots, at_most=True), seed=13)
    found: dict[frozenset[str], Episode] = {}
    for index in range(20 * TASKS):
        episode = sampler[index]
        found.setdefault(frozenset(episode.class_names), episode)
        if len(found) == TASKS:
            break
    return list(found.values())


def _scores(
    encoder: Encoder, parameters: Parameters, episodes: Sequence[Episode], draws: Sequence[Drawn], axis: Tensor
) -> dict[str, np.ndarray]:
    """Return (200, 200), how near each first draw is to each second draw, for every way of looking."""
    names = torch.stack([_names(encoder, episode) for episode in episodes])
    one, two = (_embedded(parameters, draw) for draw in draws)
    named = [TaskEmbedding(part[0], part, ()) for part in class_vectors(*draws[1], names).numpy()]
    vectors = [np.stack([task.vector for task in tasks]) for tasks in (one, two)]
    means = [_directions([draw]) for draw in draws]
    ordered = [_sorted_prototypes(draw, axis) for draw in draws]
    return {
        "similarity": np.array([[similarity(a, b) for b in two] for a in one]),
        "similarity, candidates' names known": np.array([[similarity(a, b) for b in named] for a in one]),
        "task embedding": vectors[0] @ vectors[1].T,
        "mean feature": (means[0] @ means[1].T).numpy(),
        "sorted prototypes": (ordered[0] @ ordered[1].T).numpy(),
        "label-name features": (means[0] @ normalize(names.mean(1), dim=-1).T).numpy(),
    }


def _names(encoder: Encoder, episode: Episode) -> Tensor:
    return encoder.frozen_features([readable_name(name) for name in episode.class_names])


def _ranks(scores: np.ndarray) -> list[int]:
    """Return the rank of the diagonal in each row, from 1."""
    assert np.isfinite(scores).all()
    ranks: list[int] = (scores >= np.diag(scores)[:, None]).sum(1).tolist()  # a tie is no find
    return ranks


@torch.no_grad()
def _embedded(parameters: Parameters, drawn: Drawn) -> list[TaskEmbedding]:
    assert INNER.conditioning is not None
    vectors = task_embedding(parameters, INNER.conditioning.task_encoder, *drawn).numpy()
    classes = class_vectors(*drawn).numpy()
    return [TaskEmbedding(v, c[:ways], ()) for v, c, ways in zip(vectors, classes, drawn[2].tolist(), strict=True)]


def _directions(draws: Sequence[Drawn]) -> Tensor:
    """Return the direction of the mean feature of every task."""
    return normalize(torch.cat([features.sum(1) for features, _, _ in draws]), dim=-1)


def _sorted_prototypes(drawn: Drawn, axis: Tensor) -> Tensor:
    """Return the prototypes side by side, in the order of their positions on an axis."""
    prototypes = class_moments(drawn[0], drawn[1], int(drawn[2].max()))[0]
    order = (prototypes @ axis).argsort(1)
    ordered = torch.gather(prototypes, 1, order[..., None].expand_as(prototypes))
    return normalize(ordered.flatten(1), dim=-1)


def _main_axis(encoder: Encoder, corpora: Corpora) -> Tensor:
    """Return the first principal component of the features of training texts."""
    texts = [text for corpus in corpora.train.values() for text in corpus.texts[::10]]
    features = encoder.frozen_features(texts)
    return torch.linalg.svd(features - features.mean(0), full_matrices=False)[2][0]


@torch.no_grad()
def _nll(encoder: Encoder, parameters: Parameters, episodes: Sequence[Episode]) -> Tensor:
    """Return (T,), the query NLL of prototypes, no steps taken."""
    support, query = support_batch(encoder, episodes), query_batch(encoder, episodes)
    adapted = adapt(encoder, parameters, support, replace(FITTED, steps=0))
    logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)
    return cross_entropy_per_task(logits, query.labels, query.labels >= 0)
