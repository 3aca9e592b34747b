import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy, normalize

from textmeta.model.heads import (
    HEADS,
    class_mask,
    class_weights,
    cosine_logits,
    cross_entropy_per_task,
    leave_one_out_logits,
    leave_one_out_ridge_logits,
    linear_logits,
    name_weights,
    ridge_weights,
)

TEMPERATURE = torch.tensor(7.0, dtype=torch.float64)
SCALARS = {
    name: torch.tensor(value, dtype=torch.float64)
    for name, value in {
        "temperature": float(TEMPERATURE),
        "ridge": 0.3,
        "ridge_weight": 2.0,
        "name_weight": 0.7,
    }.items()
}
WEIGHTS = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.5, 0.4, 2.5]], dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_class_weights_are_normalised_means_plus_offset() -> None:
    features, labels = unit(1, 5, 4), torch.tensor([[0, 1, 1, 0, 1]])
    offset = 0.1 * unit(1, 2, 4, seed=1)
    weights = class_weights(features, labels, offset, SCALARS)
    for c in (0, 1):
        mean = features[0, labels[0] == c].mean(0)
        torch.testing.assert_close(weights[0, c], mean / mean.norm() + offset[0, c])


def test_leave_one_out_equals_deleting_the_example() -> None:
    features, labels = unit(1, 7, 5), torch.tensor([[0, 1, 2, 0, 1, 0, 2]])
    offset = 0.3 * unit(1, 3, 5, seed=1)
    logits, counts = leave_one_out_logits(features, labels, offset, SCALARS, class_mask(torch.tensor([3])))
    assert counts.all()
    for i in range(7):
        keep = torch.arange(7) != i
        rest = class_weights(features[:, keep], labels[:, keep], offset, SCALARS)
        whole = class_weights(features, labels, offset, SCALARS)
        own = int(labels[0, i])
        expected = [
            TEMPERATURE * features[0, i] @ normalize((rest if c == own else whole)[0, c], dim=0) for c in range(3)
        ]
        torch.testing.assert_close(logits[0, i], torch.stack(expected))


def test_an_example_alone_in_its_class_does_not_count() -> None:
    features, labels = unit(1, 4, 5).requires_grad_(), torch.tensor([[0, 1, 1, 2]])
    offset = torch.zeros(1, 3, 5, dtype=torch.float64)
    logits, counts = leave_one_out_logits(features, labels, offset, SCALARS, class_mask(torch.tensor([3])))
    assert counts.tolist() == [[False, True, True, False]]
    loss = cross_entropy_per_task(logits, labels, counts)
    torch.testing.assert_close(loss[0], cross_entropy(logits[0, 1:3], labels[0, 1:3]))
    (gradient,) = torch.autograd.grad(loss.sum(), features)
    assert gradient.isfinite().all()


def test_a_task_of_single_examples_has_no_loss() -> None:
    features, labels = unit(1, 3, 5).requires_grad_(), torch.tensor([[0, 1, 2]])
    offset = torch.zeros(1, 3, 5, dtype=torch.float64, requires_grad=True)
    logits, counts = leave_one_out_logits(features, labels, offset, SCALARS, class_mask(torch.tensor([3])))
    loss = cross_entropy_per_task(logits, labels, counts)
    assert loss.tolist() == [0.0]
    for gradient in torch.autograd.grad(loss.sum(), (features, offset)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_padding_changes_nothing() -> None:
    features, labels = unit(1, 6, 5), torch.tensor([[0, 1, 0, 1, 0, 1]])
    offset = 0.2 * unit(1, 2, 5, seed=1)
    mask = class_mask(torch.tensor([2]))
    wide_features = torch.cat([features, torch.zeros(1, 3, 5, dtype=torch.float64)], 1)
    wide_labels = torch.cat([labels, torch.full((1, 3), -1)], 1)
    wide_offset = torch.cat([offset, torch.zeros(1, 2, 5, dtype=torch.float64)], 1)
    wide_mask = torch.tensor([[True, True, False, False]])
    narrow, counts = leave_one_out_logits(features, labels, offset, SCALARS, mask)
    wide, wide_counts = leave_one_out_logits(wide_features, wide_labels, wide_offset, SCALARS, wide_mask)
    torch.testing.assert_close(wide[:, :6, :2], narrow)
    assert wide_counts.tolist() == [[True] * 6 + [False] * 3]
    assert (wide[..., 2:] == -torch.inf).all()
    torch.testing.assert_close(
        cross_entropy_per_task(wide, wide_labels, wide_counts), cross_entropy_per_task(narrow, labels, counts)
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 50.0])
def test_the_cosine_does_not_see_the_length_of_weights(scale: float) -> None:
    features, weights = unit(1, 4, 5), unit(1, 3, 5, seed=2)
    mask = class_mask(torch.tensor([3]))
    torch.testing.assert_close(
        cosine_logits(features, scale * weights, SCALARS, mask), cosine_logits(features, weights, SCALARS, mask)
    )


def sklearn_ridge(features: Tensor, labels: Tensor, ways: int) -> np.ndarray:
    """The weights (C, d) of a ridge regression of one-hot labels, by scikit-learn."""
    targets = np.eye(ways)[labels.numpy()]
    return Ridge(alpha=float(SCALARS["ridge"]), fit_intercept=False).fit(features.numpy(), targets).coef_


@pytest.mark.parametrize("examples", [4, 30])  # fewer and more than the features are wide
def test_ridge_weights_are_those_of_scikit_learn(examples: int) -> None:
    features, labels = unit(1, examples, 8), torch.arange(examples)[None] % 3
    offset = 0.1 * unit(1, 3, 8, seed=1)
    weights = ridge_weights(features, labels, offset, SCALARS)
    expected = torch.from_numpy(sklearn_ridge(features[0], labels[0], 3))
    torch.testing.assert_close(weights[0], expected + offset[0])


def test_leave_one_out_ridge_equals_fitting_without_the_example() -> None:
    features, labels = unit(1, 7, 5), torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    offset = 0.3 * unit(1, 3, 5, seed=1)
    logits, counts = leave_one_out_ridge_logits(features, labels, offset, SCALARS, class_mask(torch.tensor([3])))
    assert counts.tolist() == [[True, True, False, True, True, True, True]]  # the one example of class 2 does not count
    for i in range(7):
        keep = torch.arange(7) != i
        weights = torch.from_numpy(sklearn_ridge(features[0, keep], labels[0, keep], 3)) + offset[0]
        torch.testing.assert_close(logits[0, i], TEMPERATURE * weights @ features[0, i])


def test_linear_logits_see_the_length_of_weights() -> None:
    features, weights = unit(1, 4, 5), unit(1, 3, 5, seed=2)
    mask = torch.tensor([[True, True, False]])
    logits = linear_logits(features, 2 * weights, SCALARS, mask)
    torch.testing.assert_close(logits[0, :, :2], 2 * TEMPERATURE * features[0] @ weights[0, :2].T)
    assert (logits[..., 2] == -torch.inf).all()


@pytest.mark.parametrize("name", HEADS)
def test_no_head_sees_padding(name: str) -> None:
    """Second derivatives stay finite too: a class that only pads has a zero vector, where a norm has none."""
    head = HEADS[name]
    features, labels = unit(1, 6, 5), torch.tensor([[0, 1, 0, 1, 0, 1]])
    wide_features = torch.cat([features, torch.zeros(1, 3, 5, dtype=torch.float64)], 1).requires_grad_()
    wide_labels = torch.cat([labels, torch.full((1, 3), -1)], 1)
    offset, mask = torch.zeros(1, 4, 5, dtype=torch.float64, requires_grad=True), class_mask(torch.tensor([2, 4]))[:1]
    weights = head.weights(wide_features, wide_labels, offset, SCALARS)
    narrow = head.weights(features, labels, offset[:, :2], SCALARS)
    torch.testing.assert_close(weights[:, :2], narrow)
    logits, counts = head.support_logits(wide_features, wide_labels, offset, SCALARS, mask)
    expected, _ = head.support_logits(features, labels, offset[:, :2], SCALARS, mask[:, :2])
    torch.testing.assert_close(logits[:, :6, :2], expected)
    loss = cross_entropy_per_task(logits, wide_labels, counts).sum()
    (gradient,) = torch.autograd.grad(loss, offset, create_graph=True)
    assert not gradient[:, 2:].any()
    for second in torch.autograd.grad(gradient.square().sum(), (wide_features, offset)):
        assert second.isfinite().all()
        assert second.any()


def test_names_weigh_what_was_learned_and_examples_one() -> None:
    is_name = torch.tensor([[False, True, False], [False, False, False]])
    weights = name_weights(is_name, {"name_weight": torch.tensor(2.5)})
    assert weights is not None
    assert weights.tolist() == [[1.0, 2.5, 1.0], [1.0, 1.0, 1.0]]
    assert name_weights(None, {"name_weight": torch.tensor(2.5)}) is None


def test_class_weights_are_weighted_sums() -> None:
    features, labels = unit(1, 7, 5), torch.tensor([[0, 1, 1, 0, 0, 1, 2]])
    offset = 0.1 * unit(1, 3, 5, seed=1)
    found = class_weights(features, labels, offset, SCALARS, WEIGHTS)
    for c in range(3):
        total = torch.zeros(5, dtype=torch.float64)
        for i in range(7):
            if labels[0, i] == c:
                total += WEIGHTS[0, i] * features[0, i]
        torch.testing.assert_close(found[0, c], total / total.norm() + offset[0, c])
    # class 2 has its name alone: how much that weighs does not matter
    torch.testing.assert_close(found[0, 2], features[0, 6] + offset[0, 2])


def test_weighted_leave_one_out_equals_deleting_the_row() -> None:
    features, labels = unit(1, 7, 5), torch.tensor([[0, 1, 1, 3, 0, 1, 2]])
    offset, mask = 0.3 * unit(1, 4, 5, seed=1), class_mask(torch.tensor([4]))
    logits, counts = leave_one_out_logits(features, labels, offset, SCALARS, mask, WEIGHTS)
    assert counts.tolist() == [[True, True, True, False, True, True, False]]  # an example with a name alone counts
    for i in range(7):
        keep = torch.arange(7) != i
        rest = class_weights(features[:, keep], labels[:, keep], offset, SCALARS, WEIGHTS[:, keep])
        whole = class_weights(features, labels, offset, SCALARS, WEIGHTS)
        for c in range(4):
            if c == labels[0, i] and not counts[0, i]:
                continue  # nothing is left of its class
            expected = features[0, i] @ normalize((rest if c == labels[0, i] else whole)[0, c], dim=0)
            torch.testing.assert_close(logits[0, i, c], TEMPERATURE * expected)


def weighted_solve(features: Tensor, labels: Tensor, weights: Tensor, ways: int) -> Tensor:
    """The weights (C, d) of argmin Σ w_i |y_i - W x_i|² + λ |W|², by its normal equations."""
    targets, diagonal = torch.eye(ways, dtype=torch.float64)[labels], torch.diag(weights)
    regular = SCALARS["ridge"] * torch.eye(features.shape[1], dtype=torch.float64)
    return torch.linalg.solve(features.T @ diagonal @ features + regular, features.T @ diagonal @ targets).T


@pytest.mark.parametrize("width", [3, 5, 12])  # fewer and more than the rows
def test_weighted_ridge_is_the_weighted_solve(width: int) -> None:
    features, labels = unit(1, 7, width), torch.tensor([[0, 1, 1, 3, 0, 1, 2]])
    offset, mask = 0.3 * unit(1, 4, width, seed=1), class_mask(torch.tensor([4]))
    expected = weighted_solve(features[0], labels[0], WEIGHTS[0], 4)
    torch.testing.assert_close(ridge_weights(features, labels, offset, SCALARS, WEIGHTS)[0], expected + offset[0])
    peer = Ridge(alpha=float(SCALARS["ridge"]), fit_intercept=False)
    peer.fit(features[0].numpy(), np.eye(4)[labels[0].numpy()], sample_weight=WEIGHTS[0].numpy())
    np.testing.assert_allclose(peer.coef_, expected.numpy())
    logits, counts = leave_one_out_ridge_logits(features, labels, offset, SCALARS, mask, WEIGHTS)
    assert counts.tolist() == [[True, True, True, False, True, True, False]]
    for i in range(7):
        keep = torch.arange(7) != i
        rest = weighted_solve(features[0, keep], labels[0, keep], WEIGHTS[0, keep], 4) + offset[0]
        torch.testing.assert_close(logits[0, i], TEMPERATURE * rest @ features[0, i])


@pytest.mark.parametrize("name", HEADS)
def test_weights_of_one_change_no_bit(name: str) -> None:
    features, labels = unit(2, 6, 5).float(), torch.tensor([[0, 1, 0, 1, 2, 2], [0, 1, 0, 1, -1, -1]])
    offset, mask = 0.1 * unit(2, 3, 5, seed=1).float(), class_mask(torch.tensor([3, 2]))
    scalars = {key: value.float() for key, value in SCALARS.items()}
    ones = torch.ones(2, 6)
    head = HEADS[name]
    assert torch.equal(
        head.weights(features, labels, offset, scalars, ones), head.weights(features, labels, offset, scalars, None)
    )
    for one, two in zip(
        head.support_logits(features, labels, offset, scalars, mask, ones),
        head.support_logits(features, labels, offset, scalars, mask, None),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", HEADS)
def test_derivatives_of_the_name_weight_are_finite_differences(name: str) -> None:
    """First and second ones, in the weight of the names and in the features."""
    features, labels = unit(1, 7, 5).requires_grad_(), torch.tensor([[0, 1, 1, 3, 0, 1, 2]])
    is_name = torch.tensor([[False, False, False, False, True, True, True]])
    log_weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    offset, mask, head = 0.3 * unit(1, 4, 5, seed=1), class_mask(torch.tensor([4])), HEADS[name]

    def outputs(log_weight: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        scalars = {**SCALARS, "name_weight": log_weight.exp()}
        rows = name_weights(is_name, scalars)
        logits, counts = head.support_logits(features, labels, offset, scalars, mask, rows)
        return head.weights(features, labels, offset, scalars, rows), logits[counts & ~is_name]

    (gradient,) = torch.autograd.grad(sum(part.square().sum() for part in outputs(log_weight, features)), log_weight)
    assert gradient.abs() > 1e-3
    assert gradcheck(outputs, (log_weight, features))
    assert gradgradcheck(outputs, (log_weight, features))
