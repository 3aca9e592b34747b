"""The inner loop: gradient steps on the losses of T tasks at once, differentiable to first or second order.

It knows nothing of texts: :mod:`textmeta.meta.adaptation` gives it the support loss, and training, evaluation and the
classifier's ``fit`` all come through there.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from textmeta.errors import SettingsError
from textmeta.heads.common import root
from textmeta.model.attention import twice_differentiable
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.heads import HEADS
from textmeta.model.initialisation import OFFSET, StepSizesPer

__all__ = [
    "HeadName",
    "InnerLoopSettings",
    "LossName",
    "ScheduleName",
    "gradient_steps",
    "inner_steps",
    "without_conditioning",
]

Part = Literal["lora_A", "lora_B", "offset"]
HeadName = Literal["prototype", "ridge", "readout"]
LossName = Literal["head", "neighbours"]
ScheduleName = Literal["constant", "linear"]

MAX_STEPS = 1000  # each has step sizes of its own
MAX_STRENGTHS, MAX_STRENGTH = 16, 10.0  # each costs a forward of the support set


@dataclass(frozen=True)
class InnerLoopSettings:
    """What the task learner does with a support set.

    Args:
        steps: gradient steps; 0 leaves the initialisation as it is.
        adapt: what the steps change: LoRA's B or A factors, the head's offset. ANIL adapts the offset alone, Reptile
            all three, and ProtoNet takes no steps, whatever is set here.
        head: prototype (cosine to the class means), ridge (ridge regression on the labels, R2-D2), or readout (both:
            prototypes that do not depend on the number of examples, plus a ridge regression).
        loss: what the steps lower: the mean cross entropy of the examples, each told by the head that the others make
            (head) or by its neighbours among them (neighbours: neighbourhood components), which moves no offset, and
            leaves out classes with few examples among others (:mod:`textmeta.meta.step_rows`).
        lora_step_size: step size of the LoRA factors before it is learned; a step moves an entry by about this much.
        offset_step_size: step size of the head's offset, likewise.
        schedule: how step sizes start: all the same (constant), or falling (linear), of N steps the last an Nth of the
            first. Normalised steps of one size, however small what is left to learn, go to and fro on noisy tasks.
        step_sizes: what has learned step sizes of its own, one for each step: all LoRA factors together (part), those
            of each layer (layer, as in MAML++), or each one (tensor; Meta-SGD always). The offset has its own.
        normalise: divide each task's gradient of each tensor by its root mean square, so that one step size fits all
            ways and shots; otherwise plain gradient steps, whose step sizes are of another magnitude.
        lora_epsilon: root mean square of a LoRA factor's gradient at which its normalised step is half of the step
            size; a smaller gradient, as of a task that is solved already, makes a step in proportion.
        offset_epsilon: the same for the head's offset.
        max_gradient_norm: a task's longer gradients, all tensors together, are shortened to this norm before they are
            normalised; null leaves them.
        strengths: factors on LoRA's B that each task chooses from by its support set; training takes 1 alone.
        conditioning: what the task embedding decides; null for no task encoder.
    """

    steps: int = 3
    adapt: tuple[Part, ...] = ("lora_B", "offset")
    head: HeadName = "prototype"
    loss: LossName = "head"
    lora_step_size: float = 0.01
    offset_step_size: float = 0.003
    schedule: ScheduleName = "constant"
    step_sizes: StepSizesPer = "part"
    normalise: bool = True
    lora_epsilon: float = 1e-3
    offset_epsilon: float = 1e-2
    max_gradient_norm: float | None = None
    strengths: tuple[float, ...] = (1.0,)
    conditioning: ConditioningSettings | None = None

    def scheduled(self, first: float) -> tuple[float, ...]:
        """Return the step size of each step before it is learned, from that of the first."""
        falls = self.schedule == "linear"
        return tuple(first * (1 - step / self.steps if falls else 1.0) for step in range(self.steps))

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.steps <= MAX_STEPS:
            raise SettingsError(f"inner steps must be from 0 to {MAX_STEPS}, given {self.steps}")
        known = ("lora_A", "lora_B", "offset")
        unknown = [part for part in self.adapt if part not in known]
        if unknown or not self.adapt:
            raise SettingsError(f"inner adapt must name some of {known}, given {self.adapt}")
        if self.head not in HEADS:
            raise SettingsError(f"inner head must be one of {sorted(HEADS)}, given {self.head!r}")
        if self.loss not in ("head", "neighbours"):
            raise SettingsError(f"inner loss must be 'head' or 'neighbours', given {self.loss!r}")
        if self.loss == "neighbours" and OFFSET in self.adapt:
            raise SettingsError(f"inner loss must be 'head' where the offset is adapted, given {self.loss!r}")
        if self.schedule not in ("constant", "linear"):
            raise SettingsError(f"inner schedule must be 'constant' or 'linear', given {self.schedule!r}")
        if self.step_sizes not in ("part", "layer", "tensor"):
            raise SettingsError(f"inner step_sizes must be 'part', 'layer' or 'tensor', given {self.step_sizes!r}")
        if not 1 <= len(self.strengths) <= MAX_STRENGTHS or not all(0 <= s <= MAX_STRENGTH for s in self.strengths):
            raise SettingsError(
                f"inner strengths must be 1 to {MAX_STRENGTHS} numbers from 0 to {MAX_STRENGTH:g}, given "
                f"{self.strengths!r:.80}"
            )
        for name in ("lora_step_size", "offset_step_size", "lora_epsilon", "offset_epsilon", "max_gradient_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(f"inner {name} must be positive and finite, given {value}")


def without_conditioning(inner: InnerLoopSettings) -> InnerLoopSettings:
    """Return the inner loop from the start that no task embedding has a say in."""
    return replace(inner, conditioning=None)


def gradient_steps(
    loss: Callable[[int, Mapping[str, Tensor]], Tensor],
    start: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    *,
    entries: Mapping[str, Tensor] | None = None,
    second_order_steps: int = 0,
    checkpointed: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Take the inner steps θ_{j+1} = θ_j - α_j ĝ_j, with ĝ = g / (rms(g) + ε) for each task and tensor, or ĝ = g.

    Args:
        loss: (number of the step, from 0; tensors by name, those of ``start`` and ``shared``) → (T,) losses; a task's
            loss depends on no other task's tensors.
        start: what the steps change: name → (T, …).
        shared: everything else that the loss depends on and that something is learned in.
        sizes: name → (steps,) step sizes α.
        inner: number of steps, and how gradients are shortened and normalised.
        entries: name → (T,) number of entries that a mean square is over, where not all entries of a tensor are a
            task's own.
        second_order_steps: the last so many steps are differentiated through; in those before, ĝ is a constant. So 0 is
            first order (FOMAML), ``inner.steps`` or more exact second order (MAML), and what is between truncated.
        checkpointed: whether a step that is differentiated through keeps only its inputs, and is computed again in the
            backward pass: memory then hardly grows with the number of steps, at the cost of about one more step each.

    Yields:
        The changed tensors after 0, 1, …, ``inner.steps`` steps.
    """

    def update(step: int, fast: Mapping[str, Tensor], gradients: Mapping[str, Tensor], _: Tensor) -> dict[str, Tensor]:
        directions = _directions(gradients, inner, entries or {})
        return {name: value - sizes[name][step] * directions[name] for name, value in fast.items()}

    yield from inner_steps(
        loss, start, shared, update, inner.steps, second_order_steps=second_order_steps, checkpointed=checkpointed
    )


def inner_steps(
    loss: Callable[[int, Mapping[str, Tensor]], Tensor],
    start: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    update: Callable[[int, Mapping[str, Tensor], Mapping[str, Tensor], Tensor], dict[str, Tensor]],
    steps: int,
    *,
    second_order_steps: int = 0,
    checkpointed: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Take inner steps by any rule: the loop that all adaptation goes through.

    Args:
        loss: (number of the step, from 0; tensors by name, those of ``start`` and ``shared``) → (T,) losses; a task's
            loss depends on no other task's tensors.
        start: what the steps change: name → (T, …).
        shared: everything else that the loss depends on and that something is learned in. What ``loss`` holds besides
            is differentiated through, too, in steps of second order that are not checkpointed.
        update: (number of the step, changed tensors, their gradients, losses (T,)) → the tensors after the step.
        steps: how many.
        second_order_steps: the last so many steps are differentiated through; in those before, gradients and losses are
            constants.
        checkpointed: whether a step that is differentiated through is computed again in the backward pass.

    Yields:
        The changed tensors after 0, 1, …, ``steps`` steps.
    """
    fast = dict(start)
    yield fast
    for step in range(steps):
        own = partial(loss, step)
        if step >= steps - second_order_steps:
            # what starts as a constant, such as the offset's zeros, still takes part in the derivatives
            fast = {n: value if value.requires_grad else value.detach().requires_grad_() for n, value in fast.items()}
            gradients, losses = _differentiable_gradients(own, fast, shared, checkpointed)
        else:
            gradients, losses = _constant_gradients(own, fast, shared)
        fast = update(step, fast, gradients, losses)
        yield fast


def _constant_gradients(
    loss: Callable[[Mapping[str, Tensor]], Tensor], fast: Mapping[str, Tensor], shared: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    with torch.enable_grad():
        # nothing but the gradient in the adapted parameters is needed: cut all else off
        leaves = {name: value.detach().requires_grad_() for name, value in fast.items()}
        losses = loss({**{name: value.detach() for name, value in shared.items()}, **leaves})
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True)), losses.detach()


def _differentiable_gradients(
    loss: Callable[[Mapping[str, Tensor]], Tensor],
    fast: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    checkpointed: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    names = [*fast, *shared]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        # set inside, so that a step run again in the backward pass uses the same attention
        with torch.enable_grad(), twice_differentiable():
            losses = loss(dict(zip(names, tensors, strict=True)))
            return (*torch.autograd.grad(losses.sum(), tensors[: len(fast)], create_graph=True), losses)

    tensors = (*fast.values(), *shared.values())
    # nothing here is random, and the random state is the whole process's: it is left alone
    again = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    *gradients, losses = again(*tensors) if checkpointed else run(*tensors)
    return dict(zip(fast, gradients, strict=True)), losses


def _directions(
    gradients: Mapping[str, Tensor], inner: InnerLoopSettings, entries: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Shorten and normalise the gradients of each task."""
    squares = {name: gradient.square().flatten(1).sum(1) for name, gradient in gradients.items()}
    scale = torch.ones_like(next(iter(squares.values())))
    if inner.max_gradient_norm is not None:
        norm = root(torch.stack(list(squares.values())).sum(0))
        scale = inner.max_gradient_norm / torch.maximum(norm, torch.full_like(norm, inner.max_gradient_norm))
    directions = {}
    for name, gradient in gradients.items():
        factor = scale
        if inner.normalise:
            # 0 in a task that has nothing to learn from; LoRA's A has it wherever B is 0
            rms = scale * root(squares[name] / entries.get(name, gradient[0].numel()))
            factor = scale / (rms + (inner.offset_epsilon if name == OFFSET else inner.lora_epsilon))
        directions[name] = gradient * factor.view(-1, *[1] * (gradient.ndim - 1))
    return directions
