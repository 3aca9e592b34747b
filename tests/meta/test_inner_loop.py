"""The inner loop on linear models, where the meta-gradient has a closed form."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.heads.given import random
from textmeta.meta.inner_loop import inner_steps

TASKS, EXAMPLES, WIDTH = 3, 8, 5
SIZES = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)


X, Y = random(TASKS, EXAMPLES, WIDTH, seed=0), random(TASKS, EXAMPLES, 1, seed=1)
QUERY_X, QUERY_Y = random(TASKS, EXAMPLES, WIDTH, seed=2), random(TASKS, EXAMPLES, 1, seed=3)
START = random(WIDTH, 1, seed=4)
PENALTY = torch.tensor(0.7, dtype=torch.float64)  # what the loss shares between tasks and steps


def squared_error(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return (x @ weights - y).square().sum((1, 2)) / (2 * EXAMPLES)


def support_loss(step: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """A loss of its own in each step: the examples count step + 1 times."""
    weights = tensors["weights"]
    return (step + 1) * squared_error(X, Y, weights) + tensors["penalty"] * weights.square().sum((1, 2)) / 2


def meta_gradient(second_order: bool, checkpointed: bool) -> tuple[Tensor, ...]:
    """Gradient of the summed query losses in the start, the step sizes, and the penalty."""
    start, sizes, penalty = (value.clone().requires_grad_() for value in (START, SIZES, PENALTY))

    def update(
        step: int, fast: Mapping[str, Tensor], gradients: Mapping[str, Tensor], losses: Tensor
    ) -> dict[str, Tensor]:
        assert losses.shape == (TASKS,)
        return {name: value - sizes[step] * gradients[name] for name, value in fast.items()}

    last = inner_steps(
        support_loss,
        {"weights": start.expand(TASKS, -1, -1)},
        {"penalty": penalty},
        update,
        len(SIZES),
        second_order=second_order,
        checkpointed=checkpointed,
    )
    loss = squared_error(QUERY_X, QUERY_Y, last["weights"]).sum()
    found = torch.autograd.grad(loss, (start, sizes, penalty), allow_unused=True)
    return tuple(torch.zeros(()).double() if part is None else part for part in found)


def closed_form(second_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """θ_{j+1} = θ_j - α_j g_j, g_j = (j + 1)(H θ_j - Xᵀy / n) + λ θ_j with H = XᵀX / n.

    So dθ_J/dθ_0 = Π (I - α_j ((j + 1) H + λ I)), to first order I, and λ is felt through each θ_j.
    """
    in_start, in_sizes, in_penalty = torch.zeros_like(START), torch.zeros_like(SIZES), torch.zeros_like(PENALTY)
    for x, y, query_x, query_y in zip(X, Y, QUERY_X, QUERY_Y, strict=True):
        hessian, moment = x.T @ x / EXAMPLES, x.T @ y / EXAMPLES
        thetas, gradients = [START], []
        for step, size in enumerate(SIZES):
            gradients.append((step + 1) * (hessian @ thetas[-1] - moment) + PENALTY * thetas[-1])
            thetas.append(thetas[-1] - size * gradients[-1])
        cotangent = query_x.T @ (query_x @ thetas[-1] - query_y) / EXAMPLES
        for step in reversed(range(len(SIZES))):
            in_sizes[step] -= (cotangent * gradients[step]).sum()
            if second_order:
                in_penalty -= SIZES[step] * (cotangent * thetas[step]).sum()
                cotangent = cotangent - SIZES[step] * ((step + 1) * hessian @ cotangent + PENALTY * cotangent)
        in_start += cotangent
    return in_start, in_sizes, in_penalty


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("second_order", [False, True])
def test_the_meta_gradient_of_a_linear_model_is_the_closed_form(second_order: bool, checkpointed: bool) -> None:
    found = meta_gradient(second_order, checkpointed)
    for value, expected in zip(found, closed_form(second_order), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
