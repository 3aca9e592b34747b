"""Odd input to what heads are made of: padding, no texts, equal texts, large scales, one class, no names."""

import math

import pytest
import torch
from torch import Tensor

from tests.heads import reference
from tests.heads.given import examples_of, random
from textmeta.encoder.token_states import StateBatch, TokenStates
from textmeta.heads.common import Examples
from textmeta.heads.neighbours import neighbourhood_loss, with_company
from textmeta.heads.pooling import pool
from textmeta.heads.unlabelled import soft_labels

V, D = 2, 6


def together(states: list[Tensor], longer: int = 0) -> TokenStates:
    """All texts in one batch, with ``longer`` more places of padding than the longest needs."""
    length = max(s.shape[1] for s in states) + longer
    padded = torch.stack([torch.nn.functional.pad(s, (0, 0, 0, length - s.shape[1])) for s in states])
    mask = torch.arange(length) < torch.tensor([s.shape[1] for s in states])[:, None]
    return TokenStates(len(states), (StateBatch(torch.arange(len(states)), padded, mask),))


def test_neither_padding_nor_batches_change_anything():
    states, queries = [random(V, length, D, seed=length) for length in (2, 7, 4, 9, 1)], random(V, D)
    expected = pool(together(states), queries)
    for other in (together(states, longer=5), TokenStates.padded(states, max_tokens=10), TokenStates.padded(states)):
        torch.testing.assert_close(pool(other, queries), expected, rtol=0, atol=1e-12)
    chosen = TokenStates.padded(states, max_tokens=10).where(torch.tensor([3, 0, 4]))
    torch.testing.assert_close(pool(chosen, queries), expected[[3, 0, 4]], rtol=0, atol=1e-12)


def test_no_texts_are_no_views():
    assert pool(TokenStates(0, ()), torch.zeros(V, D)).shape == (0, V, D)


def loss_of(views: Tensor, examples: Examples, view_weights: Tensor, scale: float) -> Tensor:
    return neighbourhood_loss(views, examples, with_company(examples), view_weights, torch.tensor(scale))


@pytest.mark.parametrize(
    ("labels", "classes"), [([0, 0, 1, 1], 2), ([0, 0, 0, 1, 1, 2], 3), ([0, 0, 2, 2, 2, 3, 1], 4)]
)
def test_identical_texts_lose_log_of_the_classes(labels: list[int], classes: int):
    views = reference.unit(random(1, 1, V, D)).expand(1, len(labels), V, D).clone().requires_grad_()
    loss = loss_of(views, examples_of([labels], [5]), torch.tensor([0.3, 0.7], dtype=torch.float64), 3.0)
    assert float(loss.detach()) == pytest.approx(math.log(classes))
    assert torch.autograd.grad(loss.sum(), views)[0].isfinite().all()


@pytest.mark.parametrize("scale", [30.0, 400.0])
def test_a_large_scale_stays_finite_in_single_precision(scale: float):
    """A learned scale may grow; texts whose own class is far then have a likelihood that no float32 holds."""
    views = torch.zeros(1, 4, 1, 2)
    views[0, :, 0] = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    views.requires_grad_()
    examples = Examples.of(torch.tensor([[0, 0, 1, 1]]), torch.tensor([2]), torch.float32)
    loss = loss_of(views, examples, torch.ones(1), scale)
    (gradient,) = torch.autograd.grad(loss.sum(), views)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_confidence_is_from_none_to_full():
    logits = torch.tensor([[[0.0, 0.0, 0.0], [200.0, 0.0, 5.0]], [[1.0, 1.0, 50.0], [0.0, -200.0, 50.0]]]).double()
    classes = torch.tensor([[True, True, True], [True, True, False]])
    probabilities, confidence = soft_labels(logits.requires_grad_(), classes)
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(confidence, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    assert not probabilities[1, :, 2].any()
    assert torch.autograd.grad(confidence.sum(), logits)[0].isfinite().all()
