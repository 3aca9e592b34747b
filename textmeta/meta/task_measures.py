"""What an adapter makes of tasks of unseen classes, measured once, so that calibration can try many settings on it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import logsumexp, softmax
from torch import Tensor
from tqdm import tqdm

from textmeta.data.episodes import Episode
from textmeta.errors import SettingsError
from textmeta.meta.adaptation import (
    left_out_logits,
    query_logits,
    take_steps,
    task_size,
    task_start,
    task_weights,
    unadapted,
)
from textmeta.meta.adapted import evidence, support_features
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.shared_features import SharedFeatures
from textmeta.meta.tasks import TaskBatch, support_batch, task_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import class_mask
from textmeta.model.initialisation import LOG_RIDGE_WEIGHT, LOG_TEMPERATURE, TEMPERATURE_SLOPES

__all__ = ["TaskMeasures", "leave_out_classes", "measure_adapted_tasks", "measure_tasks"]

LEFT_OUT = 3  # of so many classes one is left out of a task: its queries are out of scope


@dataclass(frozen=True)
class TaskMeasures:
    """What an adapter makes of one task, at a temperature of 1, at each of S strengths.

    Args:
        size: (2,) log shots and log (ways / 5).
        left_out: (S, n, C) leave-one-out logits of the support set.
        labels: (n,) of its rows.
        counts: (n,) which of them count.
        evidence: (S, 2), of the support set before any step (:func:`~textmeta.meta.adapted.evidence`).
        queries: (S, q, C) logits of the queries.
        query_labels: (q,).
        outside: (S, o, C) logits of texts of the classes that were left out.
        ridge: what one more of the ridge weight adds to ``left_out``, ``queries`` and ``outside``; None for heads that
            have no such weight.
    """

    size: np.ndarray
    left_out: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    evidence: np.ndarray
    queries: np.ndarray
    query_labels: np.ndarray
    outside: np.ndarray
    ridge: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def inputs(self) -> np.ndarray:
        """What the temperature depends on at each strength, (S, 4): size and evidence."""
        return np.hstack([np.tile(self.size, (len(self.evidence), 1)), self.evidence])

    def with_more_ridge(self, more: float) -> "TaskMeasures":
        """Return the measures at a ridge weight that is larger by a number."""
        if self.ridge is None:
            return self
        parts = zip((self.left_out, self.queries, self.outside), self.ridge, strict=True)
        left_out, queries, outside = (logits + more * added for logits, added in parts)
        found = _evidence(left_out, self.labels, self.counts)
        return replace(self, left_out=left_out, evidence=found, queries=queries, outside=outside)

    def query_nll(self, strength: int, temperature: float) -> float:
        """Return the mean negative log-likelihood of the queries."""
        logits = temperature * self.queries[strength]
        own = logits[np.arange(len(logits)), self.query_labels]
        return float((logsumexp(logits, axis=1) - own).mean())

    def query_nll_slope(self, strength: int, temperature: float) -> float:
        """Return the derivative of :meth:`query_nll` by the log of the temperature."""
        logits = temperature * self.queries[strength]
        own = logits[np.arange(len(logits)), self.query_labels]
        return float(((softmax(logits, axis=1) * logits).sum(1) - own).mean())

    def support_log_likelihoods(self, temperatures: np.ndarray) -> np.ndarray:
        """Return (S,) sums over the examples that count, at a temperature (S,) for each strength."""
        logits = temperatures[:, None, None] * self.left_out[:, self.counts]
        own = logits[:, np.arange(logits.shape[1]), self.labels[self.counts]]
        return np.asarray((own - logsumexp(logits, axis=2)).sum(1))


def measure_tasks(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    episodes: Sequence[Episode],
    progress: str | None = None,
) -> list[TaskMeasures]:
    """Measure an adapter on episodes, a third of whose classes are left out of the task (:func:`leave_out_classes`).

    Args:
        encoder: makes features.
        parameters: of the adapter.
        inner: whose head and strengths are used; before any steps.
        episodes: of classes that it has not seen.
        progress: label of a progress bar; None shows none.

    Raises:
        SettingsError: if the task embedding decides something: then tasks share no features.
    """
    if inner.conditioning is not None and inner.conditioning.decides:
        raise SettingsError(f"calibration is for inner loops without conditions, given {inner.conditioning}")
    tasks = [leave_out_classes(episode) for episode in episodes]
    zero = {LOG_TEMPERATURE: torch.zeros(()), TEMPERATURE_SLOPES: torch.zeros(2)}  # a temperature of 1, before evidence
    plain = {**parameters, **{name: value.to(encoder.device) for name, value in zero.items()}}
    with torch.no_grad():
        shared = SharedFeatures(encoder, parameters, episodes, inner.strengths)
        found = []
        for task in tqdm(tasks, desc=progress, unit="task", disable=progress is None):
            measures = _measure(encoder, plain, inner, shared, *task)
            if LOG_RIDGE_WEIGHT in plain:  # logits are linear in it: a second weight tells all
                weight = plain[LOG_RIDGE_WEIGHT].exp()
                more = {**plain, LOG_RIDGE_WEIGHT: (weight + 1).log()}
                measures = _with_ridge(measures, _measure(encoder, more, inner, shared, *task))
            found.append(measures)
        return found


@torch.no_grad()
def measure_adapted_tasks(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    episodes: Sequence[Episode],
    progress: str | None = None,
) -> list[TaskMeasures]:
    """Measure an adapter after strength and inner steps, so at one strength; arguments as for :func:`measure_tasks`."""
    found = []
    for whole in tqdm(episodes, desc=progress, unit="task", disable=progress is None):
        episode, outside = leave_out_classes(whole)
        support = support_batch(encoder, [episode])
        start = task_start(encoder, parameters, support, inner)
        before, _ = left_out_logits(start, support_features(encoder, start, support), support)
        adapted = take_steps(start, encoder, parameters, support, inner)
        features = support_features(encoder, adapted, support)
        weights = task_weights(encoder, adapted.with_features(features), support)
        left_out, counts = left_out_logits(adapted, features, support)
        texts = [*episode.query_texts, *outside]
        batch = task_batch(encoder, [texts], [[0] * len(texts)], [episode.ways])
        logits = query_logits(encoder, adapted, weights, batch)
        left, others = (
            part.double().cpu().numpy() / float(adapted.scalars["temperature"]) for part in (left_out, logits)
        )
        queries, start_left = len(episode.query_texts), before.double().cpu().numpy()
        found.append(_as_measures(episode, support, start_left, left, counts, others[:, :queries], others[:, queries:]))
    return found


def leave_out_classes(episode: Episode) -> tuple[Episode, tuple[str, ...]]:
    """Return an episode without its last third of classes, at least two being left, and the queries of those."""
    ways = episode.ways - (episode.ways // LEFT_OUT if episode.ways > 2 else 0)
    support, query = episode.support_labels < ways, episode.query_labels < ways
    smaller = Episode(
        corpus=episode.corpus,
        class_names=episode.class_names[:ways],
        support_texts=tuple(itertools.compress(episode.support_texts, support)),
        support_labels=episode.support_labels[support],
        query_texts=tuple(itertools.compress(episode.query_texts, query)),
        query_labels=episode.query_labels[query],
        label_names=None if episode.label_names is None else episode.label_names[:ways],
    )
    return smaller, tuple(itertools.compress(episode.query_texts, ~query))


def _with_ridge(measures: TaskMeasures, more: TaskMeasures) -> TaskMeasures:
    added = (more.left_out - measures.left_out, more.queries - measures.queries, more.outside - measures.outside)
    return replace(measures, ridge=added)


def _measure(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    shared: SharedFeatures,
    episode: Episode,
    outside: Sequence[str],
) -> TaskMeasures:
    support, features, queries = shared.task(episode)
    start, others = unadapted(parameters, support, inner, encoder.hidden_size), shared.of(outside)
    mask = class_mask(support.ways)
    left_out, of_queries, of_outside = [], [], []
    for own, query, other in zip(features, queries, others, strict=True):
        weights = task_weights(encoder, start.with_features(own[None]), support)
        logits, counts = left_out_logits(start, own[None], support)
        left_out.append(logits[0])
        of_queries.append(start.head.logits(query[None], weights, start.scalars, mask)[0])
        of_outside.append(start.head.logits(other[None], weights, start.scalars, mask)[0])
    left, inside, out = (torch.stack(part).double().cpu().numpy() for part in (left_out, of_queries, of_outside))
    return _as_measures(episode, support, left, left, counts, inside, out)


def _as_measures(
    episode: Episode,
    support: TaskBatch,
    before: np.ndarray,
    left_out: np.ndarray,
    counts: Tensor,
    queries: np.ndarray,
    outside: np.ndarray,
) -> TaskMeasures:
    """Put measures together; ``before`` are the leave-one-out logits before any step."""
    labels, counting = support.labels[0].cpu().numpy(), counts[0].cpu().numpy()
    return TaskMeasures(
        size=task_size(support.labels, support.ways)[0].double().cpu().numpy(),
        left_out=left_out,
        labels=labels,
        counts=counting,
        evidence=_evidence(before, labels, counting),
        queries=queries,
        query_labels=episode.query_labels,
        outside=outside,
    )


def _evidence(left_out: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the evidence (S, 2) of leave-one-out logits (S, n, C) of one task."""
    strengths, _, ways = left_out.shape
    own, counting = (torch.from_numpy(part).expand(strengths, -1) for part in (labels, counts))
    return evidence(torch.from_numpy(left_out), own, counting, torch.full((strengths,), ways)).numpy()
