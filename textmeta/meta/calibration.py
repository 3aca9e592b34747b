"""Calibration: what no gradient of training sets is fitted on episodes of classes that training has not seen.

That is the head's temperature, as a function of a task's size; the prior of LoRA's strengths; and the rule for what is
out of scope. To be right for classes of *other corpora*, they have to be fitted on such: several trainings can leave
out a corpus each, be measured on it, and the measurements be pooled (cross-fitting).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings, bounds
from textmeta.errors import SettingsError
from textmeta.meta.adaptation import left_out_logits, task_size, task_weights, unadapted
from textmeta.meta.inner_loop import HeadName, InnerLoopSettings
from textmeta.meta.shared_features import SharedFeatures
from textmeta.meta.training import TrainingResult
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS, class_mask
from textmeta.model.initialisation import (
    HEAD_SCALARS,
    LOG_TEMPERATURE,
    SCOPE,
    STRENGTH_PRIOR,
    TEMPERATURE_SLOPES,
    Parameters,
)
from textmeta.model.scope import task_inputs, text_inputs

__all__ = [
    "CalibrationSettings",
    "TaskMeasures",
    "calibrate",
    "calibrated",
    "calibration_episodes",
    "leave_out_classes",
    "measure_tasks",
    "with_head",
]

LEFT_OUT = 3  # of so many classes one is left out of a task: its queries are out of scope
PRIORS = (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0)  # log weights that are tried
ROUNDS = 3
SLOPE_PENALTY = 1e-3


@dataclass(frozen=True)
class CalibrationSettings:
    """What an adapter is calibrated on.

    Args:
        episodes: number of tasks of each corpus.
        rows: texts of a class that they are drawn from, so that few have to go through the encoder.
        ways: classes of an episode, a third of which are then left out; all, where there are fewer.
        shots: support examples of a class.
        queries: query examples of a class.
        head: that the adapter is given, instead of the one that it was trained with; null leaves that.
    """

    episodes: int = 150
    rows: int = 30
    ways: int | tuple[int, int] = (3, 30)
    shots: int | tuple[int, int] = (1, 10)
    queries: int | tuple[int, int] = 5
    head: HeadName | None = None

    def __post_init__(self) -> None:
        """Check the ranges; those of episodes are checked there."""
        for name in ("episodes", "rows"):
            if getattr(self, name) < 1:
                raise SettingsError(f"calibration {name} must be at least 1, given {getattr(self, name)}")


def with_head(
    parameters: Mapping[str, Tensor], inner: InnerLoopSettings, head: HeadName | None
) -> tuple[Parameters, InnerLoopSettings]:
    """Return parameters and inner loop with another head, whose own scalars start where learning would start them.

    Features that were trained with prototypes serve other heads as well; the temperature has to be calibrated then.
    """
    if head is None:
        return dict(parameters), inner
    starts = {
        HEAD_SCALARS[name]: torch.tensor(math.log(start), device=parameters[LOG_TEMPERATURE].device)
        for name, start in HEADS[head].starts.items()
    }
    return {**starts, **parameters}, replace(inner, head=head)


def calibration_episodes(corpus: Corpus, settings: CalibrationSettings, seed: int) -> list[Episode]:
    """Return the episodes that an adapter is calibrated on, half of them of 1 shot to 2, of classes it has not seen.

    Args:
        corpus: restricted to such classes.
        settings: how many, and of what.
        seed: of all draws.

    Raises:
        DataError: if a class has too few texts.
    """
    thinned = corpus.thinned(settings.rows, seed)
    low, high = bounds(settings.shots)
    halves = (low, min(low + 1, high)), (low, high)
    episodes: list[Episode] = []
    for number, shots in enumerate(halves):
        of = EpisodeSettings(settings.ways, shots, settings.queries, at_most=True)
        episodes += EpisodeSampler(thinned, of, seed + number).take((settings.episodes + 1 - number) // 2)
    return episodes


@dataclass(frozen=True)
class TaskMeasures:
    """What an adapter makes of one task, at a temperature of 1, at each of S strengths.

    Args:
        size: (2,) log shots and log (ways / 5).
        left_out: (S, n, C) leave-one-out logits of the support set.
        labels: (n,) of its rows.
        counts: (n,) which of them count.
        queries: (S, q, C) logits of the queries.
        query_labels: (q,).
        outside: (S, o, C) logits of texts of the classes that were left out.
    """

    size: np.ndarray
    left_out: np.ndarray
    labels: np.ndarray
    counts: np.ndarray
    queries: np.ndarray
    query_labels: np.ndarray
    outside: np.ndarray

    def query_nll(self, strength: int, temperature: float) -> float:
        """Return the mean negative log-likelihood of the queries."""
        logits = temperature * self.queries[strength]
        own = logits[np.arange(len(logits)), self.query_labels]
        return float((logsumexp(logits, axis=1) - own).mean())

    def support_log_likelihoods(self, temperature: float) -> np.ndarray:
        """Return (S,) sums over the examples that count."""
        logits = temperature * self.left_out[:, self.counts]
        own = logits[:, np.arange(logits.shape[1]), self.labels[self.counts]]
        return np.asarray((own - logsumexp(logits, axis=2)).sum(1))


def calibrated(
    encoder: Encoder,
    result: TrainingResult,
    corpora: Sequence[Corpus],
    settings: CalibrationSettings | None,
    seed: int,
) -> TrainingResult:
    """Return what a training made, calibrated on corpora of unseen classes; without settings, as it is."""
    if settings is None:
        return result
    parameters, inner = with_head(result.parameters, result.inner, settings.head)
    episodes = [episode for corpus in corpora for episode in calibration_episodes(corpus, settings, seed)]
    measures = measure_tasks(encoder, parameters, inner, episodes, "calibration")
    record = {**result.record, "calibration": asdict(settings)}
    return TrainingResult(calibrate(parameters, measures), inner, record)


def calibrate(parameters: Mapping[str, Tensor], measures: Sequence[TaskMeasures]) -> Parameters:
    """Return the parameters with temperature, its slopes, the prior of the strengths and the scope's rule fitted.

    Temperature t_e = exp(a + s · size_e) and prior are fitted in turn, to the mean NLL of the queries at the strength
    that each task chooses; the prior by trying all of a grid.

    Args:
        parameters: of the adapter.
        measures: of tasks of classes that it has not seen (:func:`measure_tasks`).
    """
    line = np.array([float(parameters[LOG_TEMPERATURE]), 0.0, 0.0])
    sizes = np.stack([task.size for task in measures])
    prior, chosen = np.zeros(len(measures[0].queries)), np.zeros(len(measures), dtype=int)
    for _ in range(ROUNDS):
        temperatures = np.exp(line[0] + sizes @ line[1:])
        prior, chosen = _fit_prior(measures, temperatures)
        line = _fit_temperature(measures, sizes, chosen, line)
    fitted = {LOG_TEMPERATURE: line[0], TEMPERATURE_SLOPES: line[1:], STRENGTH_PRIOR: prior}
    rule = _fit_scope(measures, np.exp(line[0] + sizes @ line[1:]), chosen)
    if rule is not None:
        fitted[SCOPE] = rule
    return {**parameters, **{name: torch.tensor(value, dtype=torch.float32) for name, value in fitted.items()}}


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
        inner: without steps.
        episodes: of classes that it has not seen.
        progress: label of a progress bar; None shows none.

    Raises:
        SettingsError: if the inner loop takes steps, or the task embedding decides something: then tasks share no
            features.
    """
    if inner.steps or (inner.conditioning is not None and inner.conditioning.decides):
        raise SettingsError(
            f"calibration is for inner loops without steps and conditions, given {inner.steps} steps and "
            f"{inner.conditioning}"
        )
    tasks = [leave_out_classes(episode) for episode in episodes]
    whole = {LOG_TEMPERATURE: torch.zeros((), device=encoder.device)}  # a temperature of 1
    whole[TEMPERATURE_SLOPES] = torch.zeros(2, device=encoder.device)
    plain = {**parameters, **whole}
    with torch.no_grad():
        shared = SharedFeatures(encoder, parameters, episodes, inner.strengths)
        return [
            _measure(encoder, plain, inner, shared, *task)
            for task in tqdm(tasks, desc=progress, unit="task", disable=progress is None)
        ]


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
    return TaskMeasures(
        size=task_size(support.labels, support.ways)[0].double().cpu().numpy(),
        left_out=left,
        labels=support.labels[0].cpu().numpy(),
        counts=counts[0].cpu().numpy(),
        queries=inside,
        query_labels=episode.query_labels,
        outside=out,
    )


def _fit_prior(measures: Sequence[TaskMeasures], temperatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log prior (S,), its largest 0, and the strength that each task then chooses."""
    pairs = list(zip(measures, temperatures, strict=True))
    likelihoods = np.stack([task.support_log_likelihoods(t) for task, t in pairs])
    strengths = range(likelihoods.shape[1])
    losses = np.array([[task.query_nll(s, t) for s in strengths] for task, t in pairs])
    best = (np.inf, np.zeros(len(strengths)), np.zeros(len(measures), dtype=int))
    for prior in itertools.product(*[PRIORS if s else (0.0,) for s in strengths]):
        chosen = (likelihoods + prior).argmax(1)
        loss = losses[np.arange(len(losses)), chosen].mean()
        if loss < best[0] - 1e-12:
            best = (loss, np.array(prior) - max(prior), chosen)
    return best[1], best[2]


def _fit_temperature(
    measures: Sequence[TaskMeasures], sizes: np.ndarray, chosen: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Return (3,): the log temperature of 5 ways and 1 shot, and its slopes."""

    def loss(line: np.ndarray) -> float:
        temperatures = np.exp(np.clip(line[0] + sizes @ line[1:], -5, 8))
        nll = [task.query_nll(s, t) for task, s, t in zip(measures, chosen, temperatures, strict=True)]
        return float(np.mean(nll) + SLOPE_PENALTY * (line[1:] ** 2).sum())

    return np.asarray(minimize(loss, start, method="BFGS").x)


def _fit_scope(measures: Sequence[TaskMeasures], temperatures: np.ndarray, chosen: np.ndarray) -> np.ndarray | None:
    """Return the rule (8,), every task, inside and outside weighing the same; None, if nothing is outside."""
    rows, inside, weights = [], [], []
    for task, strength, temperature in zip(measures, chosen, temperatures, strict=True):
        if not task.outside.size:
            continue
        t = torch.tensor(temperature)
        left_out, labels, counts = (
            torch.from_numpy(part) for part in (task.left_out[strength], task.labels, task.counts)
        )
        of_task = task_inputs(t * left_out, labels, counts, torch.from_numpy(task.size), t)
        for logits, is_inside in ((task.queries[strength], 1), (task.outside[strength], 0)):
            of_texts = text_inputs(t * torch.from_numpy(logits), t)
            rows.append(torch.cat([of_texts, of_task.expand(len(of_texts), -1)], dim=1).numpy())
            inside += [is_inside] * len(of_texts)
            weights += [1 / len(of_texts)] * len(of_texts)
    if not rows:
        return None
    scaler = StandardScaler().fit(np.concatenate(rows))
    scaled = scaler.transform(np.concatenate(rows))
    model = LogisticRegression(max_iter=1000).fit(scaled, inside, sample_weight=np.array(weights) * len(weights) / 2)
    slopes = model.coef_[0] / scaler.scale_
    return np.append(slopes, model.intercept_[0] - slopes @ scaler.mean_)
