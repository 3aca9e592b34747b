"""Adaptation: from an initialisation, inner steps on the support sets of T tasks, to a classifier for each.

Training, evaluation and the classifier's ``fit`` all call :func:`adapt`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from textmeta.meta.adapted import (
    AdaptedParameters,
    left_out,
    left_out_by_neighbours,
    left_out_logits,
    query_logits,
    support_log_likelihood,
    task_weights,
)
from textmeta.meta.inner_loop import InnerLoopSettings, gradient_steps
from textmeta.meta.step_rows import rows_in_turn, rows_taking_part
from textmeta.meta.strengths import at_best_strength
from textmeta.meta.tasks import TaskBatch
from textmeta.model.conditioning import conditioned_factors, conditioned_temperature, conditioning_start
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS, cross_entropy_per_task, membership
from textmeta.model.initialisation import (
    EVIDENCE_SLOPES,
    LOG_ADAPTED_FACTOR,
    OFFSET,
    TEMPERATURE_SLOPES,
    Parameters,
    head_scalars,
    initial_parameters,
    lora_factors,
    step_size_groups,
    step_sizes,
)
from textmeta.model.task_encoder import task_embedding, task_statistics

__all__ = [
    "BAR_AFTER",
    "AdaptedParameters",
    "TaskConditions",
    "adapt",
    "adaptation_path",
    "embed_tasks",
    "left_out_logits",
    "query_logits",
    "start_parameters",
    "support_log_likelihood",
    "take_steps",
    "task_scalars",
    "task_size",
    "task_start",
    "task_weights",
    "unadapted",
]

FEATURES = "features"
BAR_AFTER = 5.0  # seconds: what is over sooner needs no progress bar


@dataclass(frozen=True)
class TaskConditions:
    """What the start of T tasks depends on.

    Args:
        embedding: (T, e) task embeddings.
        statistics: (T, 5) numbers of each task (:func:`~textmeta.model.task_encoder.task_statistics`).
    """

    embedding: Tensor
    statistics: Tensor


def start_parameters(
    factor_shapes: Mapping[str, tuple[int, ...]], inner: InnerLoopSettings, hidden_size: int, seed: int = 0
) -> Parameters:
    """Return the parameters of an inner loop before any learning.

    Args:
        factor_shapes: shape of each LoRA factor by name.
        hidden_size: length of the features.
        inner: the inner loop; it says which step sizes there are and where they start.
        seed: of LoRA's random A, and of the task encoder.
    """
    groups = step_size_groups(_adapted_factors(factor_shapes, inner), inner.step_sizes)
    starts = dict.fromkeys(groups, inner.scheduled(inner.lora_step_size))
    if OFFSET in inner.adapt:
        starts[OFFSET] = inner.scheduled(inner.offset_step_size)
    heads, strengths = HEADS[inner.head].starts, len(inner.strengths)
    parameters = initial_parameters(factor_shapes, starts, head_starts=heads, strengths=strengths, seed=seed)
    if inner.conditioning is not None:
        parameters |= conditioning_start(inner.conditioning, factor_shapes, hidden_size, seed)
    return parameters


def embed_tasks(
    encoder: Encoder, parameters: Mapping[str, Tensor], support: TaskBatch, inner: InnerLoopSettings
) -> TaskConditions | None:
    """Return what T tasks are conditioned on; None, where their embeddings decide nothing."""
    if inner.conditioning is None or not inner.conditioning.decides:
        return None
    features = support.pad(encoder.frozen_features(support.texts.texts))
    tasks = (features, support.class_labels, support.ways)
    return TaskConditions(task_embedding(parameters, inner.conditioning.task_encoder, *tasks), task_statistics(*tasks))


def task_scalars(
    parameters: Mapping[str, Tensor], support: TaskBatch, conditions: TaskConditions | None = None
) -> dict[str, Tensor]:
    """Return the head's positive scalars, its temperature for each task (T,).

    log t = log t_0 + s · (log shots, log (ways / 5)), with the mean over classes of log shots, and slopes s that
    calibration alone sets (:mod:`textmeta.meta.calibration`); or as the task embedding says, where that conditions it.
    """
    scalars = head_scalars(parameters)
    if conditions is not None:
        scalars["temperature"] = conditioned_temperature(parameters, conditions.embedding, conditions.statistics)
    else:
        slopes = parameters[TEMPERATURE_SLOPES].detach()
        sizes = task_size(support.labels, support.ways).to(slopes.dtype)
        scalars["temperature"] = scalars["temperature"] * (sizes @ slopes).exp()
    return scalars


def task_size(labels: Tensor, ways: Tensor) -> Tensor:
    """Return (T, 2): the mean over classes of log shots, and log (ways / 5), of labels (T, n) and ways (T,).

    A name counts as a shot, and a class is taken to have one at least.
    """
    counts = membership(labels, int(ways.max())).sum(1).clamp(min=1)
    return torch.stack([counts.log().sum(1) / ways, (ways / 5).log()], dim=1)


def unadapted(
    parameters: Mapping[str, Tensor],
    support: TaskBatch,
    inner: InnerLoopSettings,
    hidden_size: int,
    conditions: TaskConditions | None = None,
) -> AdaptedParameters:
    """Return the start of T tasks, before any inner step; arguments as for :func:`adaptation_path`."""
    factors, scalars = lora_factors(parameters), task_scalars(parameters, support, conditions)
    if conditions is not None:
        factors |= conditioned_factors(parameters, conditions.embedding)
    temperature = scalars["temperature"]
    shape = (len(support.ways), int(support.ways.max()), hidden_size)
    return AdaptedParameters(factors, temperature.new_zeros(shape), scalars, HEADS[inner.head])


def adapt(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    support: TaskBatch,
    inner: InnerLoopSettings,
    conditions: TaskConditions | None = None,
    progress: str | None = None,
) -> AdaptedParameters:
    """Choose LoRA's strength for each task, then take all inner steps from there (:func:`adaptation_path`).

    Each strength s of ``inner.strengths`` makes features with s·B in place of B; a task takes the one with the largest
    sum of its log prior and the log-likelihood of the support set, every example scored by the others. Where no example
    has company in its class, the prior alone decides. How many are told right by the others has its part in the
    temperature; so have the steps, if any were taken. ``progress`` is the title of a bar over the steps, if they take
    long; None for none.
    """
    start = task_start(encoder, parameters, support, inner, conditions)
    return take_steps(start, encoder, parameters, support, inner, progress)


def task_start(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    support: TaskBatch,
    inner: InnerLoopSettings,
    conditions: TaskConditions | None = None,
) -> AdaptedParameters:
    """Return T tasks at their strengths and temperatures, before any inner step; arguments as for :func:`adapt`."""
    conditions = conditions or embed_tasks(encoder, parameters, support, inner)
    start = unadapted(parameters, support, inner, encoder.hidden_size, conditions)
    if inner.strengths == (1.0,) and not parameters[EVIDENCE_SLOPES].any():  # nothing that features would decide
        return start
    return at_best_strength(encoder, start, support, inner.strengths, parameters)


def take_steps(
    start: AdaptedParameters,
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    support: TaskBatch,
    inner: InnerLoopSettings,
    progress: str | None = None,
) -> AdaptedParameters:
    """Take all inner steps from a start; ``progress`` as for :func:`adapt`."""
    path = _path_from(start, encoder, parameters, support, inner)
    hidden = progress is None
    # the start is counted, too
    *_, adapted = tqdm(path, progress, inner.steps + 1, leave=False, unit="step", delay=BAR_AFTER, disable=hidden)
    return adapted


def adaptation_path(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    support: TaskBatch,
    inner: InnerLoopSettings,
    conditions: TaskConditions | None = None,
    *,
    second_order_steps: int = 0,
    checkpointed: bool = True,
) -> Iterator[AdaptedParameters]:
    """Take the inner steps on the support losses of T tasks (:func:`~textmeta.meta.inner_loop.gradient_steps`).

    The loss is the mean cross entropy of the examples' leave-one-out logits, by the head or by their neighbours
    (:func:`~textmeta.model.neighbours.leave_one_out_neighbours`); names are scored in none. By neighbours, each step is
    on some of the rows (:mod:`textmeta.meta.step_rows`). A task in which no example has company in its
    class, a name at least, or only one class takes part, has no loss, and stays at the initialisation. The temperature
    of the others is multiplied by a factor, in adapters that calibration has given one, for steps make features surer
    of themselves.

    Args:
        encoder: makes features.
        parameters: the initialisation.
        support: support sets of T tasks.
        inner: steps, and what they adapt.
        conditions: task embeddings to start from; by default those of the support sets (:func:`embed_tasks`).
        second_order_steps: the last so many steps are differentiated through.
        checkpointed: whether these are computed again in the backward pass, to save memory.

    Yields:
        The adapted parameters after 0, 1, … steps (the start alone, if no task has anything to learn from). Where
        ``parameters`` require a gradient they are differentiable in the start, the step sizes and the head's scalars.
    """
    conditions = conditions or embed_tasks(encoder, parameters, support, inner)
    start = unadapted(parameters, support, inner, encoder.hidden_size, conditions)
    yield from _path_from(
        start, encoder, parameters, support, inner, second_order_steps=second_order_steps, checkpointed=checkpointed
    )


def _path_from(
    start: AdaptedParameters,
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    support: TaskBatch,
    inner: InnerLoopSettings,
    *,
    second_order_steps: int = 0,
    checkpointed: bool = True,
) -> Iterator[AdaptedParameters]:
    factors, offset, scalars = start.factors, start.offset, start.scalars
    by_neighbours = inner.loss == "neighbours"
    whole = support.where(rows_taking_part(support.labels, support.ways)) if by_neighbours else support
    learned = _can_learn(whole)
    if not inner.steps or not learned.any():
        yield start
        return
    tasks = len(support.ways)
    fast = {name: factors[name].expand(tasks, *factors[name].shape[-2:]) for name in _adapted_factors(factors, inner)}
    shared = {name: value for name, value in factors.items() if name not in fast} | scalars
    if not fast:  # the head alone learns: all steps see the same features
        features = support.pad(encoder.features(support.texts, factors, support.row_task))
        start, shared = start.with_features(features), {**scalars, FEATURES: features}
    else:  # features that are known already are of the start alone
        start = replace(start, support_features=None)
    if OFFSET in inner.adapt:
        fast[OFFSET] = offset

    def loss(step: int, tensors: Mapping[str, Tensor]) -> Tensor:
        part, features = whole, tensors.get(FEATURES)
        if by_neighbours:
            part = whole.where(rows_in_turn(whole.labels, whole.is_name, whole.ways, step))
        if features is None:
            used = {name: tensors[name] for name in factors}
            features = part.pad(encoder.features(part.texts, used, part.row_task))
        if by_neighbours:
            logits, counts = left_out_by_neighbours(features, part, tensors)
        else:
            now = tensors.get(OFFSET, torch.zeros_like(offset))
            logits, counts = left_out(start, features, part, now, tensors)
        return cross_entropy_per_task(logits, part.labels, counts)

    path = gradient_steps(
        loss,
        fast,
        shared,
        {name: step_sizes(parameters, name) for name in fast},
        inner,
        # an offset has rows for the classes of the largest task: only a task's own classes are entries
        entries={OFFSET: support.ways * encoder.hidden_size},
        second_order_steps=second_order_steps,
        checkpointed=checkpointed,
    )
    after = scalars
    if LOG_ADAPTED_FACTOR in parameters:
        factor = torch.where(learned, parameters[LOG_ADAPTED_FACTOR].detach().exp(), 1.0)
        after = {**scalars, "temperature": factor * scalars["temperature"]}
    for number, tensors in enumerate(path):
        moved = {name: value for name, value in tensors.items() if name != OFFSET}
        now = after if number else scalars
        yield replace(start, factors=factors | moved, offset=tensors.get(OFFSET, offset), scalars=now)


def _adapted_factors(factors: Iterable[str], inner: InnerLoopSettings) -> list[str]:
    """Return the names of the LoRA factors that the inner steps change."""
    return [name for name in factors if any(f".{part}." in name for part in inner.adapt)]


def _can_learn(support: TaskBatch) -> Tensor:
    """Return (T,) bool, whether any class of a task has two examples, or an example and a name."""
    company = membership(support.labels, int(support.ways.max())).sum(1)  # (T, C) rows, at most one of them a name
    return (company > 1).any(1)
