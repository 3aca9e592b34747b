"""One contract for every head: what CONTRIBUTING.md asks of a row of :data:`~textmeta.heads.HEADS`.

At the end, numbers at which what heads are made of could break. The ridge against scikit-learn's: test_scikit_learn.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.heads.given import examples_of, random
from textmeta.heads import HEADS
from textmeta.heads.common import Examples
from textmeta.heads.neighbours import neighbourhood_loss, with_company
from textmeta.heads.ridge import dual_coefficients
from textmeta.heads.unlabelled import soft_labels

V, D, C = 2, 5, 4
PENALTY = torch.tensor(0.7, dtype=torch.float64)
# one with a class without examples, one of a single class, one without any, and one of more texts than dimensions
LABELS = [[0, 0, 2], [1, 1], [], [0, 3, 3, 3, 3, 0, 0, 1, 2, 1, 2, 3, 1]]
WAYS = [4, 3, 2, 4]

Head = Callable[[Tensor, Tensor, Examples, Tensor], Tensor]
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def views_of(tasks: int, n: int) -> Tensor:
    return 0.3 * random(tasks, n, V, D)


def mixture_of(tasks: int) -> Tensor:
    return random(tasks, V, seed=1).softmax(-1)


@each_head
def test_weights_are_finite_and_differentiable_and_zero_for_classes_without_examples(head: Head) -> None:
    examples = examples_of(LABELS, WAYS)
    leaves = [part.requires_grad_() for part in (views_of(4, 13), mixture_of(4), PENALTY.clone())]
    weights = head(leaves[0], leaves[1], examples, leaves[2])
    assert weights.shape == (4, V, D, C)
    assert weights.dtype == leaves[0].dtype
    assert weights.isfinite().all()
    assert not weights.movedim(3, 1)[~examples.present].any()
    found = torch.autograd.grad(weights.square().sum(), leaves, materialize_grads=True)
    assert all(part.isfinite().all() for part in found)
    assert found[0][0, :3].any()


@each_head
def test_padding_and_the_other_tasks_change_nothing(head: Head) -> None:
    views, mixture = views_of(4, 13), mixture_of(4)
    together = head(views, mixture, examples_of(LABELS, WAYS), PENALTY)
    changed = views.clone()
    for task, labels in enumerate(LABELS):
        changed[task, len(labels) :] = 5.0
    torch.testing.assert_close(head(changed, mixture, examples_of(LABELS, WAYS), PENALTY), together)
    for task, (labels, ways) in enumerate(zip(LABELS, WAYS, strict=True)):
        one = slice(task, task + 1)
        alone = head(views[one, : len(labels)], mixture[one], examples_of([labels], [ways]), PENALTY)
        torch.testing.assert_close(together[one, ..., :ways], alone)


@each_head
def test_a_row_counts_as_often_as_its_weight_says(head: Head) -> None:
    labels, rows = [0, 1, 2, 0, 1], [0, 1, 2, 4, 4, 4]
    views, mixture = views_of(1, 5), mixture_of(1)
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0, 3.0]], dtype=torch.float64)
    weighted = head(views, mixture, examples_of([labels], [3]).weighted(weights), PENALTY)
    examples = examples_of([[labels[row] for row in rows]], [3])
    torch.testing.assert_close(weighted, head(views[:, rows], mixture, examples, PENALTY))


@each_head
def test_the_order_of_rows_and_classes_does_not_matter(head: Head) -> None:
    labels, order, renamed = LABELS[3], torch.randperm(13, generator=torch.Generator().manual_seed(0)), [2, 0, 3, 1]
    views, mixture = views_of(1, 13), mixture_of(1)
    plain = head(views, mixture, examples_of([labels], [C]), PENALTY)
    examples = examples_of([[renamed[labels[row]] for row in order.tolist()]], [C])
    torch.testing.assert_close(head(views[:, order], mixture, examples, PENALTY)[..., renamed], plain)


@each_head
def test_a_text_scores_best_for_the_class_of_texts_like_it_and_scores_are_about_one(head: Head) -> None:
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    middles = torch.eye(3, D, dtype=torch.float64) - 1 / 3 * (torch.arange(D) < 3)
    views = (middles[labels][:, None] + 0.05 * random(9, V, D))[None]
    weights = head(views, mixture_of(1), examples_of([labels], [3]), PENALTY)
    scores = torch.einsum("nvd,vdc->nc", views[0], weights[0])
    assert scores.argmax(1).tolist() == labels
    assert 0.3 < float(scores.detach().abs().max()) < 3


def test_gradients_are_finite_at_weights_of_zero() -> None:
    kernel, weights = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    dual_coefficients(kernel, torch.ones(3, 2, dtype=torch.float64), weights, PENALTY).sum().backward()
    assert weights.grad is not None
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("scale", [30.0, 400.0])
def test_a_large_scale_stays_finite_in_single_precision(scale: float) -> None:
    """A learned scale may grow; texts whose own class is far then have a likelihood that no float32 holds."""
    views = torch.zeros(1, 4, 1, 2)
    views[0, :, 0] = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    views.requires_grad_()
    examples = Examples.of(torch.tensor([[0, 0, 1, 1]]), torch.tensor([2]), torch.float32)
    loss = neighbourhood_loss(views, examples, with_company(examples), torch.ones(1), torch.tensor(scale))
    (gradient,) = torch.autograd.grad(loss.sum(), views)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_confidence_is_from_none_to_full() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0], [200.0, 0.0, 5.0]], [[1.0, 1.0, 50.0], [0.0, -200.0, 50.0]]]).double()
    classes = torch.tensor([[True, True, True], [True, True, False]])
    probabilities, confidence = soft_labels(logits.requires_grad_(), classes)
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(confidence, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    assert not probabilities[1, :, 2].any()
    assert torch.autograd.grad(confidence.sum(), logits)[0].isfinite().all()
