import math

import pytest
import torch
from torch import Tensor

from tests.heads import reference
from tests.heads.given import examples_of
from textmeta.heads.common import Examples
from textmeta.heads.neighbours import neighbourhood_loss, with_company

V, D = 2, 5
SCALE = torch.tensor(3.0, dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def loss_of(views: Tensor, examples: Examples, view_weights: Tensor, scale: Tensor) -> Tensor:
    return neighbourhood_loss(views, examples, with_company(examples), view_weights, scale)


def views_of(tasks: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return reference.unit(torch.randn(tasks, n, V, D, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(
    ("labels", "classes"), [([0, 0, 1, 1], 2), ([0, 0, 0, 1, 1, 2], 3), ([0, 0, 2, 2, 2, 3, 1], 4)]
)
def test_identical_texts_lose_log_of_the_classes(labels: list[int], classes: int):
    views = views_of(1, 1).expand(1, len(labels), V, D).clone().requires_grad_()
    loss = loss_of(views, examples_of([labels], [5]), WEIGHTS, SCALE)
    assert float(loss.detach()) == pytest.approx(math.log(classes))
    assert torch.autograd.grad(loss.sum(), views)[0].isfinite().all()


@pytest.mark.parametrize("scale", [30.0, 400.0])
def test_a_large_scale_stays_finite_in_single_precision(scale: float):
    """A learned scale may grow; texts whose own class is far then have a likelihood that no float32 holds."""
    views = torch.zeros(1, 4, 1, 2)
    views[0, :, 0] = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    views.requires_grad_()
    examples = Examples.of(torch.tensor([[0, 0, 1, 1]]), torch.tensor([2]), torch.float32)
    loss = loss_of(views, examples, torch.ones(1), torch.tensor(scale))
    (gradient,) = torch.autograd.grad(loss.sum(), views)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
