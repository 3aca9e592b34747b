"""The inner loop on linear models, where the meta-gradient has a closed form."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from textmeta.errors import SettingsError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings, gradient_steps

TASKS, EXAMPLES, WIDTH = 3, 8, 5
PLAIN = InnerLoopSettings(steps=3, normalise=False)
SIZES = torch.tensor([0.3, 0.2, 0.1], dtype=torch.float64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = normal(TASKS, EXAMPLES, WIDTH, seed=0), normal(TASKS, EXAMPLES, 1, seed=1)
QUERY_X, QUERY_Y = normal(TASKS, EXAMPLES, WIDTH, seed=2), normal(TASKS, EXAMPLES, 1, seed=3)
START = normal(WIDTH, 1, seed=4)


def squared_error(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return ((x @ weights - y).square().sum((1, 2))) / (2 * EXAMPLES)


def support_loss(step: int, tensors: Mapping[str, Tensor]) -> Tensor:
    return squared_error(X, Y, tensors["weights"])


def meta_gradient(inner: InnerLoopSettings, second_order_steps: int, checkpointed: bool) -> tuple[Tensor, Tensor]:
    """Gradient of the summed query losses in the start and in the step sizes."""
    start, sizes = START.clone().requires_grad_(), SIZES.clone().requires_grad_()
    path = gradient_steps(
        support_loss,
        {"weights": start.expand(TASKS, -1, -1)},
        {},
        {"weights": sizes},
        inner,
        second_order_steps=second_order_steps,
        checkpointed=checkpointed,
    )
    *_, last = path
    found = torch.autograd.grad(squared_error(QUERY_X, QUERY_Y, last["weights"]).sum(), (start, sizes))
    return found[0], found[1]


def closed_form(second_order_steps: int) -> tuple[Tensor, Tensor]:
    """With H = XᵀX / n, θ_{j+1} = θ_j - α_j (H θ_j - Xᵀy / n): dθ_J/dθ_0 = Π (I - α_j H), over the steps that count."""
    start_gradient, size_gradient = torch.zeros_like(START), torch.zeros_like(SIZES)
    for x, y, query_x, query_y in zip(X, Y, QUERY_X, QUERY_Y, strict=True):
        hessian, moment = x.T @ x / EXAMPLES, x.T @ y / EXAMPLES
        thetas = [START]
        for size in SIZES:
            thetas.append(thetas[-1] - size * (hessian @ thetas[-1] - moment))
        cotangent = query_x.T @ (query_x @ thetas[-1] - query_y) / EXAMPLES
        for step in reversed(range(len(SIZES))):
            size_gradient[step] -= (cotangent * (hessian @ thetas[step] - moment)).sum()
            if step >= len(SIZES) - second_order_steps:
                cotangent = cotangent - SIZES[step] * hessian @ cotangent
        start_gradient += cotangent
    return start_gradient, size_gradient


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("second_order_steps", [0, 1, 2, 3])
def test_the_meta_gradient_of_a_linear_model_is_the_closed_form(second_order_steps: int, checkpointed: bool) -> None:
    """First order (0), truncated (1, 2) and exact (3)."""
    found = meta_gradient(PLAIN, second_order_steps, checkpointed)
    for value, expected in zip(found, closed_form(second_order_steps), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_the_orders_differ() -> None:
    starts = [closed_form(steps)[0] for steps in range(4)]
    for one, two in itertools.pairwise(starts):
        assert (one - two).norm() > 0.01 * two.norm()


def test_more_second_order_steps_than_there_are_is_exact() -> None:
    for one, two in zip(meta_gradient(PLAIN, 10, True), meta_gradient(PLAIN, 3, True), strict=True):
        assert torch.equal(one, two)


def test_the_path_has_every_step_and_leaves_the_start_alone() -> None:
    start = START.expand(TASKS, -1, -1).clone()
    before = start.clone()
    path = list(gradient_steps(support_loss, {"weights": start}, {}, {"weights": SIZES}, PLAIN))
    assert len(path) == 4
    assert torch.equal(path[0]["weights"], before)
    assert torch.equal(start, before)
    for checkpointed in (False, True):  # nor does second order
        list(
            gradient_steps(
                support_loss, {"weights": start}, {}, {"weights": SIZES}, PLAIN,
                second_order_steps=3, checkpointed=checkpointed,
            )
        )  # fmt: skip
        assert torch.equal(start, before)
        assert not start.requires_grad
    losses = torch.stack([support_loss(0, tensors) for tensors in path])
    assert (losses[1:] < losses[:-1]).all()


def test_long_gradients_are_shortened_task_by_task() -> None:
    norm = 0.05
    inner = replace(PLAIN, steps=1, max_gradient_norm=norm)
    weights = START.expand(TASKS, -1, -1) * torch.tensor([1.0, 5.0, 0.0])[:, None, None]
    ones = {"weights": torch.ones(1, dtype=torch.float64)}
    plain = list(gradient_steps(support_loss, {"weights": weights}, {}, ones, replace(inner, max_gradient_norm=None)))
    clipped = list(gradient_steps(support_loss, {"weights": weights}, {}, ones, inner))
    gradient, step = weights - plain[1]["weights"], weights - clipped[1]["weights"]
    assert (gradient.flatten(1).norm(dim=1) > norm).all()
    torch.testing.assert_close(step, norm * gradient / gradient.flatten(1).norm(dim=1)[:, None, None])
    loose = list(gradient_steps(support_loss, {"weights": weights}, {}, ones, replace(inner, max_gradient_norm=1e3)))
    assert torch.equal(loose[1]["weights"], plain[1]["weights"])


def test_a_normalised_step_has_the_size_asked_for() -> None:
    inner = InnerLoopSettings(steps=1, lora_epsilon=1e-12)
    sizes = {"weights": torch.tensor([0.01], dtype=torch.float64)}
    start, end = gradient_steps(support_loss, {"weights": START.expand(TASKS, -1, -1)}, {}, sizes, inner)
    moved = (end["weights"] - start["weights"]).flatten(1)
    torch.testing.assert_close(moved.square().mean(1).sqrt(), torch.full((TASKS,), 0.01, dtype=torch.float64))


def test_step_sizes_start_as_scheduled() -> None:
    assert InnerLoopSettings(steps=4).scheduled(0.3) == (0.3,) * 4
    falling = InnerLoopSettings(steps=4, schedule="linear", lora_step_size=0.4, offset_step_size=0.1)
    assert falling.scheduled(1.0) == (1.0, 0.75, 0.5, 0.25)
    assert replace(falling, steps=0).scheduled(1.0) == ()
    found = start_parameters({"layer.0.lora_B.weight": (2, 3)}, falling, 8)
    assert found["log_step_size.lora"].exp().tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert found["log_step_size.offset"].exp().tolist() == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"adapt": ("lora_C",)},
        {"adapt": ()},
        {"lora_step_size": 0.0},
        {"offset_epsilon": -1.0},
        {"head": "svm"},
        {"loss": "hinge", "adapt": ("lora_B",)},
        {"loss": "neighbours"},  # the offset is adapted, by default
        {"schedule": "cosine"},
        {"step_sizes": "entry"},
        {"max_gradient_norm": 0.0},
        {"lora_epsilon": float("inf")},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        InnerLoopSettings(**wrong)  # type: ignore[arg-type]
