"""The inner loop: from an initialisation, a few gradient steps on the support sets of T tasks.

Training, evaluation and the classifier's ``fit`` all call :func:`adapt`; there is no other inner loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from textmeta.errors import SettingsError
from textmeta.meta.tasks import TaskBatch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import (
    class_mask,
    class_weights,
    cosine_logits,
    cross_entropy_per_task,
    leave_one_out_logits,
)
from textmeta.model.initialisation import OFFSET, lora_factors, step_sizes, temperature

__all__ = ["AdaptedParameters", "InnerLoopSettings", "adapt", "query_logits", "task_weights"]

Part = Literal["lora_A", "lora_B", "offset"]


@dataclass(frozen=True)
class InnerLoopSettings:
    """What the task learner does with a support set.

    Args:
        steps: gradient steps; 0 leaves the initialisation as it is.
        adapt: what the steps change: LoRA's B or A factors, the head's offset. Reptile adapts all three, and
            ProtoNet takes no steps, whatever is set here.
        lora_step_size: step size of the LoRA factors before it is learned; a step moves an entry by about this much.
        offset_step_size: step size of the head's offset, likewise.
        lora_epsilon: root mean square of a LoRA factor's gradient at which its step is half of the step size; a
            smaller gradient, as of a task that is solved already, makes a step in proportion.
        offset_epsilon: the same for the head's offset.
    """

    steps: int = 3
    adapt: tuple[Part, ...] = ("lora_B", "offset")
    lora_step_size: float = 0.01
    offset_step_size: float = 0.003
    lora_epsilon: float = 1e-3
    offset_epsilon: float = 1e-2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.steps < 0:
            raise SettingsError(f"inner steps must not be negative, given {self.steps}")
        known = ("lora_A", "lora_B", "offset")
        unknown = [part for part in self.adapt if part not in known]
        if unknown or not self.adapt:
            raise SettingsError(f"inner adapt must name some of {known}, given {self.adapt}")
        for name in ("lora_step_size", "offset_step_size", "lora_epsilon", "offset_epsilon"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"inner {name} must be positive, given {getattr(self, name)}")


@dataclass(frozen=True)
class AdaptedParameters:
    """What the task learner made of the initialisation, for T tasks.

    Args:
        factors: every LoRA factor by name; adapted ones (T, out, in), shared ones (out, in).
        offset: (T, C, d), the head's.
        temperature: scalar.
    """

    factors: dict[str, Tensor]
    offset: Tensor
    temperature: Tensor


def adapt(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    support: TaskBatch,
    inner: InnerLoopSettings,
) -> AdaptedParameters:
    """Take the inner steps: θ_{j+1} = θ_j - α_j ĝ_j, with ĝ = g / (rms(g) + ε) for each task and tensor.

    g is the gradient of the leave-one-out support loss (:func:`~textmeta.model.heads.leave_one_out_logits`). Its
    normalisation makes one step size fit all ways and shots. A task in which every example is alone in its class
    has no such loss, and stays at the initialisation.

    Args:
        encoder: makes features.
        parameters: the initialisation.
        support: support sets of T tasks.
        inner: steps, and what they adapt.

    Returns:
        The adapted parameters. Where ``parameters`` require a gradient they are differentiable in the start, the step
        sizes and the temperature; the ĝ are constants (first order).
    """
    factors = lora_factors(parameters)
    tasks = len(support.ways)
    offset = torch.zeros(
        tasks, int(support.ways.max()), encoder.hidden_size, device=encoder.device, dtype=temperature(parameters).dtype
    )
    if inner.steps and _can_learn(support):
        parts = tuple(f".{part}." for part in inner.adapt if part != OFFSET)
        fast = {
            name: value.expand(tasks, *value.shape)
            for name, value in factors.items()
            if any(part in name for part in parts)
        }
        if OFFSET in inner.adapt:
            fast[OFFSET] = offset
        for step in range(inner.steps):
            directions = _directions(encoder, parameters, factors, fast, support, inner)
            fast = {name: value - step_sizes(parameters, name)[step] * directions[name] for name, value in fast.items()}
        offset = fast.pop(OFFSET, offset)
        factors = factors | fast
    return AdaptedParameters(factors, offset, temperature(parameters))


def _can_learn(support: TaskBatch) -> bool:
    """Whether any class of any task has two examples."""
    tasks = torch.arange(len(support.ways), device=support.labels.device)[:, None]
    keys = (tasks * int(support.ways.max()) + support.labels)[support.labels >= 0]
    return bool((torch.bincount(keys) > 1).any())


def _directions(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    factors: Mapping[str, Tensor],
    fast: Mapping[str, Tensor],
    support: TaskBatch,
    inner: InnerLoopSettings,
) -> dict[str, Tensor]:
    """Return the normalised gradient of the support loss in each adapted parameter."""
    with torch.enable_grad():
        # nothing but the gradient in the adapted parameters is needed: cut all else off
        factors = {name: value.detach() for name, value in factors.items()}
        fast = {name: value.detach().requires_grad_() for name, value in fast.items()}
        used = {**factors, **{name: value for name, value in fast.items() if name != OFFSET}}
        features = support.pad(encoder.features(support.texts, used, support.row_task))
        offset = fast.get(OFFSET)
        if offset is None:
            offset = features.new_zeros(len(support.ways), int(support.ways.max()), features.shape[-1])
        logits, counts = leave_one_out_logits(
            features, support.labels, offset, temperature(parameters).detach(), class_mask(support.ways)
        )
        loss = cross_entropy_per_task(logits, support.labels, counts).sum()
        gradients = torch.autograd.grad(loss, list(fast.values()))
    directions = {}
    for name, gradient in zip(fast, gradients, strict=True):
        # an offset has rows for the classes of the largest task: only a task's own classes are entries
        entries = support.ways * gradient.shape[2] if name == OFFSET else gradient[0].numel()
        mean_square = (gradient.square().sum(dim=(1, 2)) / entries)[:, None, None]
        # the square root has no derivative at 0, where a masked task's gradient is: keep it off 0
        rms = torch.where(mean_square > 0, mean_square, torch.ones_like(mean_square)).sqrt()
        directions[name] = gradient / (rms + (inner.offset_epsilon if name == OFFSET else inner.lora_epsilon))
    return directions


def task_weights(encoder: Encoder, adapted: AdaptedParameters, support: TaskBatch) -> Tensor:
    """Return the head of each task, (T, C, d): prototypes of the adapted features plus the adapted offset."""
    features = support.pad(encoder.features(support.texts, adapted.factors, support.row_task))
    return class_weights(features, support.labels, adapted.offset)


def query_logits(encoder: Encoder, adapted: AdaptedParameters, weights: Tensor, query: TaskBatch) -> Tensor:
    """Return (T, n, C) logits of the query examples, -inf for classes that a task does not have."""
    features = query.pad(encoder.features(query.texts, adapted.factors, query.row_task))
    return cosine_logits(features, weights, adapted.temperature, class_mask(query.ways))
