import pytest
import torch

from tests.heads import reference
from tests.heads.given import examples_of, random
from textmeta.heads.common import Examples
from textmeta.heads.ridge import dual_coefficients, ridge

V, D = 2, 5
PENALTY = torch.tensor(0.7, dtype=torch.float64)


def test_gradients_are_finite_at_weights_of_zero():
    kernel, weights = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    dual_coefficients(kernel, torch.ones(3, 2, dtype=torch.float64), weights, PENALTY).sum().backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()


LABELS = [[0, 0, 0, 1, 2, 2], [1, 0], [0, 3, 3, 3, 3, 0, 0, 1, 2, 1, 2, 3, 1], []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ridge_is_the_plain_closed_form_of_each_task(dtype: torch.dtype):
    examples = examples_of(LABELS, [3, 2, 4, 2])  # 13 texts, 10 dimensions: primal
    views, mixture = random(4, 13, V, D), random(4, V, seed=1).softmax(-1)
    short = Examples(examples.member.to(dtype), examples.weights.to(dtype), examples.classes)
    found = ridge(views.to(dtype), mixture.to(dtype), short, PENALTY.to(dtype))
    for task, labels in enumerate(LABELS):
        expected = torch.zeros(V, D, 4, dtype=torch.float64)
        if labels:
            targets, omega = reference.one_hot_targets(labels, 4), reference.balanced_weights(labels)
            expected = reference.ridge_fit(views[task, : len(labels)], mixture[task], targets, omega, PENALTY)
        atol = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found[task].double(), expected, rtol=0, atol=atol)
