"""Calibration: what no gradient of training sets is fitted on episodes of classes that training has not seen.

That is the head's temperature, as a function of a task's size; the prior of LoRA's strengths; and the rule for what is
out of scope. To be right for classes of *other corpora*, they have to be fitted on such: several trainings can leave
out a corpus each, be measured on it, and the measurements be pooled (cross-fitting).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings, bounds
from textmeta.errors import SettingsError
from textmeta.meta.inner_loop import HeadName, InnerLoopSettings
from textmeta.meta.task_measures import TaskMeasures, leave_out_classes, measure_tasks
from textmeta.meta.training import TrainingResult
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS
from textmeta.model.initialisation import (
    HEAD_SCALARS,
    LOG_RIDGE_WEIGHT,
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

RIDGE_WEIGHTS = (0.1, 0.3, 1.0, 3.0, 6.0)  # that are tried
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
    """Return the parameters with temperature, ridge weight, prior of the strengths and the scope's rule fitted.

    Temperature t_e = exp(a + s · size_e) and prior are fitted in turn, to the mean NLL of the queries at the strength
    that each task chooses; the prior, and a readout's ridge weight, by trying all of a grid.

    Args:
        parameters: of the adapter.
        measures: of tasks of classes that it has not seen (:func:`measure_tasks`).
    """
    fitted: dict[str, Any] = {}
    if LOG_RIDGE_WEIGHT in parameters:
        own = float(parameters[LOG_RIDGE_WEIGHT].exp())
        tried = {
            weight: _fit([task.with_more_ridge(weight - own) for task in measures], parameters)
            for weight in RIDGE_WEIGHTS
        }
        weight = min(tried, key=lambda weight: tried[weight].loss)
        fitted[LOG_RIDGE_WEIGHT] = math.log(weight)
        measures, fit = [task.with_more_ridge(weight - own) for task in measures], tried[weight]
    else:
        fit = _fit(measures, parameters)
    fitted |= {LOG_TEMPERATURE: fit.line[0], TEMPERATURE_SLOPES: fit.line[1:], STRENGTH_PRIOR: fit.prior}
    sizes = np.stack([task.size for task in measures])
    rule = _fit_scope(measures, np.exp(fit.line[0] + sizes @ fit.line[1:]), fit.chosen)
    if rule is not None:
        fitted[SCOPE] = rule
    return {**parameters, **{name: torch.tensor(value, dtype=torch.float32) for name, value in fitted.items()}}


@dataclass(frozen=True)
class _Fit:
    line: np.ndarray  # (3,) log temperature of 5 ways and 1 shot, and its slopes
    prior: np.ndarray  # (S,)
    chosen: np.ndarray  # (tasks,) number of the strength of each
    loss: float  # mean NLL of the queries


def _fit(measures: Sequence[TaskMeasures], parameters: Mapping[str, Tensor]) -> _Fit:
    """Fit temperature and prior, in turn."""
    line = np.array([float(parameters[LOG_TEMPERATURE]), 0.0, 0.0])
    sizes = np.stack([task.size for task in measures])
    for _ in range(ROUNDS):
        prior, chosen, _ = _fit_prior(measures, np.exp(line[0] + sizes @ line[1:]))
        line = _fit_temperature(measures, sizes, chosen, line)
    prior, chosen, loss = _fit_prior(measures, np.exp(line[0] + sizes @ line[1:]))
    return _Fit(line, prior, chosen, loss)


def _fit_prior(measures: Sequence[TaskMeasures], temperatures: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the log prior (S,), its largest 0, the strength that each task then chooses, and the mean NLL."""
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
    return best[1], best[2], float(best[0])


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
