"""Calibration: what no gradient of training sets is fitted on episodes of classes that training has not seen.

That is the head's temperature, as a function of a task's size and of how well its support set predicts itself, and the
factor on it once inner steps were taken; the prior of LoRA's strengths; and the rule for what is out of scope. To be
right for classes of *other corpora*, they have to be fitted on such: several trainings can leave out a corpus each, be
measured on it, and the measurements be pooled (cross-fitting). Users' classes are often broader than those of a corpus,
so a share of the tasks can have unions of classes, which are harder to tell.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings, bounds
from textmeta.errors import SettingsError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings, without_conditioning
from textmeta.meta.task_measures import TaskMeasures, leave_out_classes, measure_adapted_tasks, measure_tasks
from textmeta.meta.training import TrainingResult
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import (
    EVIDENCE_SLOPES,
    LOG_ADAPTED_FACTOR,
    LOG_RIDGE_WEIGHT,
    LOG_TEMPERATURE,
    SCOPE,
    STRENGTH_PRIOR,
    TEMPERATURE_SLOPES,
    Parameters,
    lora_factors,
)
from textmeta.model.scope import task_inputs, text_inputs

__all__ = [
    "CALIBRATED",
    "CalibrationSettings",
    "TaskMeasures",
    "as_used",
    "calibrate",
    "calibrated",
    "calibration_episodes",
    "leave_out_classes",
    "measure_tasks",
    "recalibrate",
]

# what calibration sets
LINE = (LOG_TEMPERATURE, TEMPERATURE_SLOPES, EVIDENCE_SLOPES)  # of the log temperature before inner steps
CALIBRATED = (*LINE, LOG_RIDGE_WEIGHT, STRENGTH_PRIOR, LOG_ADAPTED_FACTOR, SCOPE)  # the last two where there is need
RIDGE_WEIGHTS = (0.1, 0.3, 1.0, 3.0, 6.0)  # that are tried
PRIORS = (-10.0, -5.0, -2.0, 0.0, 2.0, 5.0, 10.0)  # log weights that are tried
ROUNDS = 3
SLOPE_PENALTY = 1e-3
MERGED = (2, 3, 5)  # so many classes become one in coarse tasks
LOG_TEMPERATURES = (-5.0, 8.0)  # from, to
LOG_FACTORS = (-3.0, 3.0)  # from, to, by the inner steps
MERGINGS = 6  # different ones of each corpus


@dataclass(frozen=True)
class CalibrationSettings:
    """What an adapter is calibrated on.

    Args:
        episodes: number of tasks of each corpus.
        rows: texts of a class that they are drawn from, so that few have to go through the encoder.
        ways: classes of an episode, a third of which are then left out; all, where there are fewer.
        shots: support examples of a class.
        queries: query examples of a class.
        coarse: share of the tasks whose classes are unions of 2, 3 or 5 classes each.
        inner: the inner loop that the adapter is given, instead of the one that it was trained with; null leaves that.
        adapted_episodes: number of tasks of each corpus to set the temperature after the inner steps by.
    """

    episodes: int = 150
    rows: int = 30
    ways: int | tuple[int, int] = (3, 30)
    shots: int | tuple[int, int] = (1, 10)
    queries: int | tuple[int, int] = 5
    coarse: float = 0.0
    inner: InnerLoopSettings | None = None
    adapted_episodes: int = 30

    @property
    def adapted(self) -> "CalibrationSettings":
        """What the temperature after the inner steps is set by."""
        return replace(self, episodes=self.adapted_episodes)

    def __post_init__(self) -> None:
        """Check the ranges; those of episodes are checked there."""
        for name in ("episodes", "rows", "adapted_episodes"):
            if getattr(self, name) < 1:
                raise SettingsError(f"calibration {name} must be at least 1, given {getattr(self, name)}")
        if not 0 <= self.coarse <= 1:
            raise SettingsError(f"calibration coarse is a share, from 0 to 1, given {self.coarse!r}")


def as_used(
    parameters: Mapping[str, Tensor], inner: InnerLoopSettings, settings: CalibrationSettings
) -> tuple[Parameters, InnerLoopSettings]:
    """Return parameters and inner loop as the settings say that the adapter is to be used.

    What the given inner loop has and the old one had not (step sizes, scalars of a head) starts where learning would
    start it. Features that were trained with prototypes serve other heads as well, but the temperature has to be
    calibrated then.
    """
    if settings.inner is None:
        return dict(parameters), inner
    used = replace(settings.inner, conditioning=inner.conditioning)
    shapes = {name: tuple(value.shape) for name, value in lora_factors(parameters).items()}
    old, new = (start_parameters(shapes, without_conditioning(loop), 0) for loop in (inner, used))
    others = {name: value for name, value in parameters.items() if name not in old}  # of the task encoder
    fitting = {n: parameters[n] for n, value in new.items() if n in parameters and parameters[n].shape == value.shape}
    device = parameters[LOG_TEMPERATURE].device
    return {name: value.to(device) for name, value in {**new, **fitting, **others}.items()}, used


def calibration_episodes(corpus: Corpus, settings: CalibrationSettings, seed: int) -> list[Episode]:
    """Return the episodes that an adapter is calibrated on, half of them of 1 shot to 2, of classes it has not seen.

    Args:
        corpus: restricted to such classes. With fewer than 3 it has no coarse tasks.
        settings: how many, and of what.
        seed: of all draws.

    Raises:
        DataError: if a class has too few texts.
    """
    thinned = corpus.thinned(settings.rows, seed)
    coarse = round(settings.episodes * settings.coarse) if len(corpus.class_names) > 2 else 0
    episodes = _few_shots_and_all(thinned, settings, settings.episodes - coarse, seed)
    for number in range(MERGINGS if coarse else 0):
        merged = thinned.merged(MERGED[number % len(MERGED)], seed + number)
        episodes += _few_shots_and_all(merged, settings, (coarse + number) // MERGINGS, seed)
    return episodes


def _few_shots_and_all(corpus: Corpus, settings: CalibrationSettings, count: int, seed: int) -> list[Episode]:
    """Return so many episodes, the first half of the smallest numbers of shots."""
    low, high = bounds(settings.shots)
    episodes: list[Episode] = []
    for number, shots in enumerate(((low, min(low + 1, high)), (low, high))):
        of = EpisodeSettings(settings.ways, shots, settings.queries, at_most=True)
        episodes += EpisodeSampler(corpus, of, seed + number).take((count + 1 - number) // 2)
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
    parameters, inner = as_used(result.parameters, result.inner, settings)
    episodes = [episode for corpus in corpora for episode in calibration_episodes(corpus, settings, seed)]
    parameters = calibrate(parameters, measure_tasks(encoder, parameters, inner, episodes, "calibration"))
    if inner.steps:
        fewer = [e for corpus in corpora for e in calibration_episodes(corpus, settings.adapted, seed)]
        adapted = measure_adapted_tasks(encoder, parameters, inner, fewer, "calibration after the inner steps")
        parameters = recalibrate(parameters, adapted)
    return TrainingResult(parameters, inner, {**result.record, "calibration": asdict(settings)})


def calibrate(parameters: Mapping[str, Tensor], measures: Sequence[TaskMeasures]) -> Parameters:
    """Return the parameters with temperature, ridge weight, prior of the strengths and the scope's rule fitted.

    Temperature t_e = exp(a + s · (size_e, evidence_e)) and prior are fitted in turn, to the mean NLL of the queries at
    the strength that each task chooses; the prior, and a readout's ridge weight, by trying all of a grid.

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
    fitted |= dict(zip(LINE, (fit.line[0], fit.line[1:3], fit.line[3:]), strict=True)) | {STRENGTH_PRIOR: fit.prior}
    temperatures = _temperatures(measures, fit.line)[np.arange(len(measures)), fit.chosen]
    return _with_fitted(parameters, fitted, measures, temperatures, fit.chosen)


def recalibrate(parameters: Mapping[str, Tensor], measures: Sequence[TaskMeasures]) -> Parameters:
    """Return the parameters with the temperature's factor after inner steps, and the scope's rule, fitted.

    The steps make features surer of themselves. Tasks that have nothing to learn from take none, and keep the
    temperature that they had.

    Args:
        parameters: calibrated.
        measures: of the same adapter, or of others with the same calibration (:func:`measure_adapted_tasks`).
    """
    line = np.concatenate([parameters[name].double().cpu().reshape(-1) for name in LINE])
    learned, before = np.array([task.counts.any() for task in measures]), _temperatures(measures, line)[:, 0]

    def after(log_factor: float) -> np.ndarray:
        return before * np.where(learned, math.exp(log_factor), 1.0)

    def loss(log_factor: float) -> float:
        return float(np.mean([task.query_nll(0, t) for task, t in zip(measures, after(log_factor), strict=True)]))

    found = minimize_scalar(loss, bounds=LOG_FACTORS, method="bounded").x if learned.any() else 0.0
    return _with_fitted(parameters, {LOG_ADAPTED_FACTOR: found}, measures, after(found), np.zeros_like(learned, int))


def _with_fitted(
    parameters: Mapping[str, Tensor],
    fitted: Mapping[str, Any],
    measures: Sequence[TaskMeasures],
    temperatures: np.ndarray,
    chosen: np.ndarray,
) -> Parameters:
    """Return the parameters with what was fitted, and the scope's rule at these temperatures of the tasks."""
    rule, like = _fit_scope(measures, temperatures, chosen), parameters[LOG_TEMPERATURE]
    fitted = fitted if rule is None else {**fitted, SCOPE: rule}
    return {**parameters, **{name: like.new_tensor(value, dtype=torch.float32) for name, value in fitted.items()}}


@dataclass(frozen=True)
class _Fit:
    line: np.ndarray  # (5,) log temperature of 5 ways and 1 shot, and its slopes
    prior: np.ndarray  # (S,)
    chosen: np.ndarray  # (tasks,) number of the strength of each
    loss: float  # mean NLL of the queries


def _fit(measures: Sequence[TaskMeasures], parameters: Mapping[str, Tensor]) -> _Fit:
    """Fit temperature and prior, in turn."""
    line = np.array([float(parameters[LOG_TEMPERATURE]), 0.0, 0.0, 0.0, 0.0])
    for _ in range(ROUNDS):
        prior, chosen, _ = _fit_prior(measures, _temperatures(measures, line))
        line = _fit_temperature(measures, chosen, line)
    prior, chosen, loss = _fit_prior(measures, _temperatures(measures, line))
    return _Fit(line, prior, chosen, loss)


def _temperatures(measures: Sequence[TaskMeasures], line: np.ndarray) -> np.ndarray:
    """Return the temperature (tasks, S) of each task at each strength."""
    return _temperature(np.stack([task.inputs for task in measures]), line)


def _temperature(inputs: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Return the temperatures (…,) of inputs (…, 4), within what a temperature can be."""
    return np.asarray(np.exp(np.clip(line[0] + inputs @ line[1:], *LOG_TEMPERATURES)))


def _fit_prior(measures: Sequence[TaskMeasures], temperatures: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the log prior (S,), its largest 0, the strength that each task then chooses, and the mean NLL."""
    pairs = list(zip(measures, temperatures, strict=True))
    likelihoods = np.stack([task.support_log_likelihoods(t) for task, t in pairs])
    strengths = range(likelihoods.shape[1])
    losses = np.array([[task.query_nll(s, t[s]) for s in strengths] for task, t in pairs])
    best = (np.inf, np.zeros(len(strengths)), np.zeros(len(measures), dtype=int))
    for prior in itertools.product(*[PRIORS if s else (0.0,) for s in strengths]):
        chosen = (likelihoods + prior).argmax(1)
        loss = losses[np.arange(len(losses)), chosen].mean()
        if loss < best[0] - 1e-12:
            best = (loss, np.array(prior) - max(prior), chosen)
    return best[1], best[2], float(best[0])


def _fit_temperature(measures: Sequence[TaskMeasures], chosen: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return (5,): the log temperature of 5 ways and 1 shot, and its slopes."""
    inputs = np.stack([task.inputs[strength] for task, strength in zip(measures, chosen, strict=True)])

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        of_tasks = list(zip(measures, chosen, _temperature(inputs, line), strict=True))
        nll = np.mean([task.query_nll(s, t) for task, s, t in of_tasks])
        slopes = np.array([task.query_nll_slope(s, t) for task, s, t in of_tasks])
        gradient = np.append(slopes.mean(), slopes @ inputs / len(slopes) + 2 * SLOPE_PENALTY * line[1:])
        return float(nll + SLOPE_PENALTY * (line[1:] ** 2).sum()), gradient

    return np.asarray(minimize(loss, start, jac=True, method="BFGS").x)


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
