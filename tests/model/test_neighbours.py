"""Leave-one-out neighbours against loops over pairs, and against scikit-learn's neighbourhood components."""

import math

import pytest
import torch
from sklearn.neighbors import NeighborhoodComponentsAnalysis
from torch import Tensor

from textmeta.model.neighbours import NEIGHBOUR_TEMPERATURE, leave_one_out_neighbours

LABELS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [1, 0, 0, 1, 0, 0, -1]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
WEIGHTS = torch.tensor([[1.0, 0.3, 1.0, 2.0, 1.0, 0.5, 1.0], [1.0, 0.5, 1.0, 1.0, 3.0, 1.0, 0.0]], dtype=torch.float64)


def features(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1) * (LABELS >= 0)[..., None]


def by_pairs(own: Tensor, labels: list[int], weights: list[float], i: int, c: int) -> float:
    """log Σ_j w_j exp(t f_i·f_j) / Σ_j w_j over the rows j ≠ i of class c."""
    rows = [j for j, label in enumerate(labels) if label == c and j != i]
    near = sum(weights[j] * math.exp(NEIGHBOUR_TEMPERATURE * float(own[i] @ own[j])) for j in rows)
    return math.log(near / sum(weights[j] for j in rows))


@pytest.mark.parametrize("weighted", [False, True])
def test_logits_are_those_of_pairs(weighted: bool) -> None:
    rows = features()
    logits, counts = leave_one_out_neighbours(rows, LABELS, MASK, WEIGHTS if weighted else None)
    assert counts.tolist() == (LABELS >= 0).tolist(), "none is alone in its class"
    for task in range(2):
        labels = LABELS[task].tolist()
        weights = WEIGHTS[task].tolist() if weighted else [1.0] * 7
        for i, label in enumerate(labels):
            for c in range(3):
                if not MASK[task, c]:
                    assert logits[task, i, c] == -math.inf
                elif label >= 0:
                    expected = by_pairs(rows[task], labels, weights, i, c)
                    assert float(logits[task, i, c]) == pytest.approx(expected, rel=1e-9)


def test_an_example_alone_in_its_class_does_not_count() -> None:
    labels = torch.tensor([[0, 1, 1], [0, 1, 2]])
    logits, counts = leave_one_out_neighbours(features()[:, :3], labels, torch.ones(2, 3, dtype=torch.bool))
    assert counts.tolist() == [[False, True, True], [False] * 3]
    assert logits[1].isfinite().all()
    assert logits[0].isfinite().all(0).tolist() == [True, True, False]
    assert (logits[0, :, 2] == -math.inf).all(), "no row can be taken for a class that has none"


def test_loss_of_a_balanced_task_is_that_of_scikit_learn() -> None:
    """It adds probabilities up where this has means: the same, after a factor on the sums of an example's own class.

    Its objective is a sum of probabilities over squared distances, here 2 - 2 cos of rows scaled by √(t / 2).
    """
    labels, rows = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]), features()[:1]
    logits, _ = leave_one_out_neighbours(rows, labels, torch.ones(1, 2, dtype=torch.bool))
    sizes = torch.tensor([3.0, 4.0], dtype=torch.float64)
    sums = logits + (sizes - torch.nn.functional.one_hot(labels, 2)).log()
    found = torch.gather(sums.softmax(-1), 2, labels[..., None]).sum()

    scaled = (rows[0] * math.sqrt(NEIGHBOUR_TEMPERATURE / 2)).numpy()
    model = NeighborhoodComponentsAnalysis(n_components=5, init="identity")
    model.n_iter_ = 0
    same = (labels[0][:, None] == labels[0][None]).numpy()
    loss, _ = model._loss_grad_lbfgs(torch.eye(5, dtype=torch.float64).numpy().ravel(), scaled, same, -1.0)
    assert float(found) == pytest.approx(-loss, rel=1e-9)


def test_derivatives_are_those_of_differences() -> None:
    rows = features().requires_grad_()
    weights = WEIGHTS.clone().requires_grad_()

    def loss(given: Tensor, row_weights: Tensor) -> Tensor:
        logits, _ = leave_one_out_neighbours(given, LABELS, MASK, row_weights)
        return logits[LABELS >= 0].softmax(-1).square().sum()

    assert torch.autograd.gradcheck(loss, (rows, weights))
    assert torch.autograd.gradgradcheck(loss, (rows, weights))


def test_texts_that_are_the_same_or_opposite_stay_finite() -> None:
    row = torch.nn.functional.normalize(torch.ones(1, 4, 3), dim=-1)
    rows = (row * torch.tensor([1.0, 1.0, -1.0, -1.0])[None, :, None]).requires_grad_()
    labels = torch.tensor([[0, 1, 0, 1]])
    logits, _ = leave_one_out_neighbours(rows, labels, torch.ones(1, 2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(logits.sum(), rows)
    assert logits.isfinite().all()
    assert gradient.isfinite().all()
