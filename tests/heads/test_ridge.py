import pytest
import torch

from tests.heads import reference
from tests.heads.given import examples_of, random
from textmeta.heads.common import Examples
from textmeta.heads.prototype import prototypes
from textmeta.heads.ridge import dual_coefficients, primal_weights, ridge

V, D = 2, 5
PENALTY = torch.tensor(0.7, dtype=torch.float64)


@pytest.mark.parametrize("n", [3, 12])
def test_dual_and_primal_agree_with_weights_of_zero_too(n: int):
    design, targets, weights = random(n, 6), random(n, 3, seed=1), random(n, seed=2).abs()
    weights[::3] = 0
    primal = primal_weights(design, targets, weights, PENALTY)
    dual = design.T @ dual_coefficients(design @ design.T, targets, weights, PENALTY)
    torch.testing.assert_close(dual, primal, rtol=0, atol=1e-12)
    kept = weights > 0
    torch.testing.assert_close(primal, primal_weights(design[kept], targets[kept], weights[kept], PENALTY))


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


@pytest.mark.parametrize("rows", [slice(0, 2), slice(0, 3)])
def test_both_forms_agree_in_a_batch(rows: slice):
    """Task 0 beside a small one is solved dual, beside a large one primal."""
    views, mixture = random(4, 13, V, D), random(4, V, seed=1).softmax(-1)
    labels = LABELS[rows]
    examples = examples_of(labels, [4] * len(labels))
    found = ridge(views[rows, : examples.member.shape[1]], mixture[rows], examples, PENALTY)[0]
    targets, omega = reference.one_hot_targets(LABELS[0], 4), reference.balanced_weights(LABELS[0])
    torch.testing.assert_close(found, reference.ridge_fit(views[0, :6], mixture[0], targets, omega, PENALTY))


def test_prototypes_are_cosines_to_class_means():
    views, mixture, texts = random(1, 4, V, D), torch.tensor([[0.3, 0.7]], dtype=torch.float64), random(2, V, D, seed=3)
    found = torch.einsum("nvd,vdc->nc", texts, prototypes(views, mixture, examples_of([[0, 0, 0, 2]], [3]))[0])
    means = torch.stack([views[0, :3].mean(0), views[0, 3]])  # (2, V, D)
    cosine = torch.einsum("nvd,cvd->nvc", texts, means / means.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(found[:, [0, 2]], torch.einsum("nvc,v->nc", cosine, mixture[0]))
    assert not found[:, 1].any()
