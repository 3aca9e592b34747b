"""The readout head against plain loops, explicit regressions, and rows that are really deleted."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import normalize

from tests.model.test_heads import SCALARS, unit
from textmeta.model.heads import HEADS, class_mask, class_weights
from textmeta.model.readout import leave_one_out_readout, readout_weights
from textmeta.model.ridge import dual_ridge

LABELS = torch.tensor([0, 1, 1, 0, 2, 1, 3, 1, 2])  # class 3 has one row alone
ROW_WEIGHTS = torch.tensor([1.0, 1.0, 0.4, 1.0, 1.0, 2.5, 1.0, 1.0, 0.7], dtype=torch.float64)
WAYS = 4
each_size = pytest.mark.parametrize("size", [5, 20])  # fewer features than rows, and more
each_weighting = pytest.mark.parametrize("rows", [None, ROW_WEIGHTS], ids=["equal", "weighted"])


def pairs(features: Tensor, labels: Tensor, weights: Tensor) -> tuple[list[float], list[float]]:
    """Return of each class the sum of cosines of its pairs of different rows, and of the pairs' weights."""
    sums, counts = [0.0] * WAYS, [0.0] * WAYS
    for i, j in itertools.permutations(range(len(labels)), 2):
        if labels[i] == labels[j]:
            weight = float(weights[i] * weights[j])
            sums[int(labels[i])] += weight * float(features[i] @ features[j])
            counts[int(labels[i])] += weight
    return sums, counts


def task_cosine(features: Tensor, labels: Tensor, weights: Tensor) -> float:
    sums, counts = pairs(features, labels, weights)
    return max((sum(sums) + 5 * 0.5) / (sum(counts) + 5), 0.01)


def prototypes(features: Tensor, labels: Tensor, weights: Tensor, cosine: float) -> list[Tensor]:
    """Return P_c of each class that has rows, 0 of others."""
    sums, counts = pairs(features, labels, weights)
    found = []
    for c in range(WAYS):
        total, weight = torch.zeros(features.shape[1], dtype=torch.float64), 0.0
        for i in range(len(labels)):
            if labels[i] == c:
                total, weight = total + weights[i] * features[i], weight + float(weights[i])
        length = max((sums[c] + 10 * cosine) / (counts[c] + 10), 0.01) ** 0.5
        found.append(total / (weight or 1.0) / length)
    return found


def regression_weights(labels: Tensor, weights: Tensor) -> Tensor:
    """Return (n,) what each row weighs in the regression: every class the same, in all as much as all rows."""
    of_class = torch.stack([weights[labels == c].sum() for c in range(WAYS)])
    return weights / of_class[labels] * of_class.mean()


def regression(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the (C, d) that minimise Σ_i w_i |y_i - W f_i|² + λ |W|², by the normal equations."""
    targets = torch.eye(WAYS, dtype=torch.float64)[labels]
    weighted = weights[:, None] * features
    normal = features.T @ weighted + SCALARS["ridge"] * torch.eye(features.shape[1], dtype=torch.float64)
    return torch.linalg.solve(normal, weighted.T @ targets).T


def task(size: int) -> tuple[Tensor, Tensor]:
    """Return features (n, size) of classes that are not all alike, and an offset (1, C, size)."""
    features = normalize(unit(len(LABELS), size) + 0.7 * unit(WAYS, size, seed=4)[LABELS], dim=1)
    return features, 0.2 * unit(1, WAYS, size, seed=1)


@each_weighting
@each_size
def test_weights_are_prototypes_and_a_regression(size: int, rows: Tensor | None) -> None:
    features, offset = task(size)
    weights = torch.ones(len(LABELS), dtype=torch.float64) if rows is None else rows
    ours = None if rows is None else rows[None]
    found = readout_weights(features[None], LABELS[None], offset, SCALARS, ours)[0]
    own = prototypes(features, LABELS, weights, task_cosine(features, LABELS, weights))
    ridge = regression(features, LABELS, regression_weights(LABELS, weights))
    torch.testing.assert_close(found, torch.stack(own) + SCALARS["ridge_weight"] * ridge + offset[0])


@each_weighting
@each_size
def test_leave_one_out_equals_deleting_the_row(size: int, rows: Tensor | None) -> None:
    """What is said to be held is: the task's mean cosine, and in the regression the weights of the other rows."""
    features, offset = task(size)
    weights = torch.ones(len(LABELS), dtype=torch.float64) if rows is None else rows
    ours = None if rows is None else rows[None]
    found, counts = leave_one_out_readout(features[None], LABELS[None], offset, SCALARS, ours)
    assert counts[0].tolist() == [True] * 6 + [False] + [True] * 2
    cosine = task_cosine(features, LABELS, weights)
    whole, in_regression = prototypes(features, LABELS, weights, cosine), regression_weights(LABELS, weights)
    for i in range(len(LABELS)):
        keep, own = torch.arange(len(LABELS)) != i, int(LABELS[i])
        rest = prototypes(features[keep], LABELS[keep], weights[keep], cosine)
        products = torch.stack([features[i] @ (rest if c == own else whole)[c] for c in range(WAYS)])
        products += (
            SCALARS["ridge_weight"] * regression(features[keep], LABELS[keep], in_regression[keep]) @ features[i]
        )
        products += offset[0] @ features[i]
        compared = [c for c in range(WAYS) if counts[0, i] or c != own]  # alone, it has no prototype of its own
        torch.testing.assert_close(found[0, i, compared], products[compared])


def test_logits_are_products_times_the_temperature() -> None:
    features, offset = task(5)
    mask = class_mask(torch.tensor([WAYS]))
    products, _ = leave_one_out_readout(features[None], LABELS[None], offset, SCALARS)
    logits, _ = HEADS["readout"].support_logits(features[None], LABELS[None], offset, SCALARS, mask, None)
    torch.testing.assert_close(logits, SCALARS["temperature"] * products)
    weights = readout_weights(features[None], LABELS[None], offset, SCALARS)
    logits = HEADS["readout"].logits(features[None], weights, SCALARS, mask)
    torch.testing.assert_close(logits[0], SCALARS["temperature"] * features @ weights[0].T)


@each_weighting
@each_size
def test_padding_does_not_matter(size: int, rows: Tensor | None) -> None:
    """Rows and classes that only pad, beside a task that is larger."""
    features, offset = task(size)
    more, classes = 4, 3
    large_labels = torch.arange(len(LABELS) + more) % (WAYS + classes)
    large = unit(len(LABELS) + more, size, seed=7)
    wide = torch.stack([torch.cat([features, torch.zeros(more, size, dtype=torch.float64)]), large])
    labels = torch.stack([torch.cat([LABELS, torch.full((more,), -1)]), large_labels])
    offsets = torch.cat([offset, torch.zeros(1, classes, size, dtype=torch.float64)], 1)
    offsets = torch.cat([offsets, torch.zeros_like(offsets)])
    row_weights = (
        None if rows is None else torch.stack([torch.cat([rows, torch.full((more,), 1.7)]), 1 + 0 * large[:, 0]])
    )
    mask = class_mask(torch.tensor([WAYS, WAYS + classes]))
    found = readout_weights(wide, labels, offsets, SCALARS, row_weights)
    logits, counts = HEADS["readout"].support_logits(wide, labels, offsets, SCALARS, mask, row_weights)
    ours, alone = None if rows is None else rows[None], class_mask(torch.tensor([WAYS]))
    expected = readout_weights(features[None], LABELS[None], offset, SCALARS, ours)[0]
    torch.testing.assert_close(found[0, :WAYS], expected)
    assert not found[0, WAYS:].any()
    expected, expected_counts = HEADS["readout"].support_logits(
        features[None], LABELS[None], offset, SCALARS, alone, ours
    )
    torch.testing.assert_close(logits[0, : len(LABELS), :WAYS], expected[0])
    assert (logits[0, :, WAYS:] == -torch.inf).all()
    assert counts[0].tolist() == [*expected_counts[0].tolist(), *[False] * more]


def around(means: Tensor, labels: Tensor, spread: float, seed: int) -> Tensor:
    """Return features of length 1 around the mean of each label's class, all classes spread alike."""
    noise = torch.randn(
        *labels.shape, means.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=means.dtype
    )
    return normalize(means[labels] + spread * noise, dim=-1)


def test_classes_of_one_example_and_of_many_are_equally_near() -> None:
    """The product of a text with its class: by prototypes of length 1 it tells how many examples the class has."""
    tasks, size, many = 400, 64, 20
    labels = torch.cat([torch.tensor([0, 1]), torch.tensor([2, 3]).repeat_interleave(many)]).expand(tasks, -1)
    means = torch.eye(size, dtype=torch.float64)[:WAYS]
    support = around(means, labels, 0.13, seed=0)
    queries = around(means, torch.arange(WAYS).expand(tasks, -1), 0.13, seed=1)
    offset = torch.zeros(tasks, WAYS, size, dtype=torch.float64)
    scalars = {**SCALARS, "ridge_weight": torch.tensor(0.0, dtype=torch.float64)}

    def products(weights: Callable[..., Tensor]) -> Tensor:
        return (queries * weights(support, labels, offset, scalars)).sum(-1).mean(0)

    few, rich = products(readout_weights).view(2, 2).mean(1)
    assert abs(few / rich - 1) < 0.03
    few, rich = products(class_weights).view(2, 2).mean(1)
    assert few / rich < 0.8


def test_a_large_class_does_not_pull_the_regression() -> None:
    """Every class weighs the same in it: three further copies of the rows of one change nothing."""
    features, offset = task(20)
    copied = torch.cat([torch.arange(len(LABELS)), *[torch.nonzero(LABELS == 1)[:, 0]] * 3])
    heavy = {**SCALARS, "ridge_weight": torch.tensor(1e6, dtype=torch.float64)}  # the prototypes do not count
    # a class weighs as much as one of mean size, and λ against that
    again = {**heavy, "ridge": heavy["ridge"] * len(copied) / len(LABELS)}
    one = readout_weights(features[None], LABELS[None], offset, heavy)
    two = readout_weights(features[copied][None], LABELS[copied][None], offset, again)
    torch.testing.assert_close(one / 1e6, two / 1e6, rtol=1e-4, atol=1e-5)


@each_size
def test_gradients(size: int) -> None:
    labels = torch.stack([torch.tensor([0, 1, 1, 0, 2, 2, 1]), torch.tensor([0, 1, 1, 0, 0, -1, -1])])
    features = normalize(unit(2, 7, size), dim=-1) * (labels >= 0)[..., None]
    offset = 0.2 * unit(2, 3, size, seed=1)
    ridge, weight = SCALARS["ridge"].clone(), SCALARS["ridge_weight"].clone()
    rows = torch.tensor([[1.0, 1.0, 0.4, 1.0, 1.0, 2.5, 1.0]], dtype=torch.float64).repeat(2, 1)

    def weights(features: Tensor, offset: Tensor, ridge: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        return readout_weights(features, labels, offset, {"ridge": ridge, "ridge_weight": weight}, rows)

    def left_out(features: Tensor, offset: Tensor, ridge: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        products, counts = leave_one_out_readout(
            features, labels, offset, {"ridge": ridge, "ridge_weight": weight}, rows
        )
        return products[counts]

    for function in (weights, left_out):
        given = tuple(value.clone().requires_grad_() for value in (features, offset, ridge, weight, rows))
        assert gradcheck(function, given, fast_mode=True)
        assert gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("rows", [3, 5, 12])
def test_ridge_by_either_inverse(rows: int) -> None:
    features, targets, ridge = unit(2, rows, 5), unit(2, rows, 3, seed=1), torch.tensor(0.1, dtype=torch.float64)
    inverse = torch.linalg.inv(features @ features.transpose(1, 2) + ridge * torch.eye(rows, dtype=torch.float64))
    found, diagonal = dual_ridge(features, targets, ridge)
    torch.testing.assert_close(found, inverse @ targets)
    torch.testing.assert_close(diagonal, inverse.diagonal(dim1=1, dim2=2))
