"""One contract for every head: what CONTRIBUTING.md asks of a row of :data:`~textmeta.heads.HEADS`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.heads.given import examples_of, random
from textmeta.heads import HEADS
from textmeta.heads.common import Examples

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
