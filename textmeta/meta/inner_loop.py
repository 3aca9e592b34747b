"""The inner loop: gradient steps on the losses of T tasks at once, differentiable to first or second order.

It knows nothing of texts: :mod:`textmeta.meta.learner` gives it the losses.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from textmeta.encoder.attention import attention_by, plain_attention

Tensors = Mapping[str, Tensor]  # by name
LossOfStep = Callable[[int, Tensors], Tensor]


def inner_steps(
    loss: LossOfStep,
    start: Tensors,
    shared: Tensors,
    update: Callable[[int, Tensors, Tensors, Tensor], dict[str, Tensor]],
    steps: int,
    *,
    second_order: bool,
    checkpointed: bool,
) -> dict[str, Tensor]:
    """Take inner steps by any rule, the loop of all adaptation; return the changed tensors after the last.

    Args:
        loss: (number of the step, from 0; tensors by name, those of ``start`` and ``shared``) → (T,) losses; a task's
            loss depends on no other task's tensors.
        start: what the steps change: name → (T, …).
        shared: everything else that the loss depends on and that something is learned in. What ``loss`` holds besides
            is differentiated through, too, in steps of second order that are not checkpointed.
        update: (number of the step, changed tensors, their gradients, losses (T,)) → the tensors after the step.
        steps: how many.
        second_order: whether the steps are differentiated through; else gradients and losses are constants.
        checkpointed: whether a step that is differentiated through is computed again in the backward pass.
    """
    fast = dict(start)
    shared = {name: value for name, value in shared.items() if name not in start}
    for step in range(steps):
        own = partial(loss, step)
        if second_order:
            # what starts as a constant, such as the offset's zeros, still takes part in the derivatives
            fast = {n: value if value.requires_grad else value.detach().requires_grad_() for n, value in fast.items()}
            gradients, losses = _differentiable_gradients(own, fast, shared, checkpointed)
        else:
            gradients, losses = _constant_gradients(own, fast, shared)
        fast = update(step, fast, gradients, losses)
    return fast


def _constant_gradients(loss: Callable[[Tensors], Tensor], fast: Tensors, shared: Tensors) -> tuple[Tensors, Tensor]:
    with torch.enable_grad():
        # nothing but the gradient in the adapted parameters is needed: cut all else off
        leaves = {name: value.detach().requires_grad_() for name, value in fast.items()}
        losses = loss({**{name: value.detach() for name, value in shared.items()}, **leaves})
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True)), losses.detach()


def _differentiable_gradients(
    loss: Callable[[Tensors], Tensor], fast: Tensors, shared: Tensors, checkpointed: bool
) -> tuple[Tensors, Tensor]:
    names = [*fast, *shared]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        # set inside, so that a step run again in the backward pass uses the same attention
        with torch.enable_grad(), attention_by(plain_attention):
            losses = loss(dict(zip(names, tensors, strict=True)))
            return (*torch.autograd.grad(losses.sum(), tensors[: len(fast)], create_graph=True), losses)

    tensors = (*fast.values(), *shared.values())
    # nothing here is random, and the random state is the whole process's: it is left alone
    again = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    *gradients, losses = again(*tensors) if checkpointed else run(*tensors)
    return dict(zip(fast, gradients, strict=True)), losses
