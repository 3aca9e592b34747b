import math

import pytest
import torch
from torch import Tensor

from tests.heads import reference
from textmeta.encoder.token_states import StateBatch, TokenStates
from textmeta.heads.common import Examples
from textmeta.heads.pooling import centre, centred, pool, with_unlabelled_centre

V, D = 2, 6


def texts(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(V, length, D, generator=generator, dtype=torch.float64) for length in lengths]


def together(states: list[Tensor], longer: int = 0) -> TokenStates:
    """All texts in one batch, with ``longer`` more places of padding than the longest needs."""
    length = max(s.shape[1] for s in states) + longer
    padded = torch.stack([torch.nn.functional.pad(s, (0, 0, 0, length - s.shape[1])) for s in states])
    mask = torch.arange(length) < torch.tensor([s.shape[1] for s in states])[:, None]
    return TokenStates(len(states), (StateBatch(torch.arange(len(states)), padded, mask),))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_query_of_zeros_is_mean_pooling():
    states = texts(1, 3, 5)
    expected = torch.stack([s.mean(1) / s.mean(1).norm(dim=-1, keepdim=True) for s in states])
    torch.testing.assert_close(pool(together(states), torch.zeros(V, D, dtype=torch.float64)), expected)


def test_pooling_is_attention_on_scaled_token_states():
    states, queries = texts(1, 4, 7), 3 * random(V, D)
    torch.testing.assert_close(pool(together(states), queries), reference.views_of(states, queries), rtol=0, atol=1e-12)


def test_neither_padding_nor_batches_change_anything():
    states, queries = texts(2, 7, 4, 9, 1), random(V, D)
    expected = pool(together(states), queries)
    for other in (together(states, longer=5), TokenStates.padded(states, max_tokens=10), TokenStates.padded(states)):
        torch.testing.assert_close(pool(other, queries), expected, rtol=0, atol=1e-12)
    chosen = TokenStates.padded(states, max_tokens=10).where(torch.tensor([3, 0, 4]))
    torch.testing.assert_close(pool(chosen, queries), expected[[3, 0, 4]], rtol=0, atol=1e-12)


def test_each_task_has_its_own_queries():
    states, queries = texts(2, 7, 4, 9), random(2, V, D)
    tasks = torch.tensor([0, 1, 1, 0])
    found = pool(TokenStates.padded(states, max_tokens=10), queries, tasks)
    for row, task in enumerate(tasks.tolist()):
        torch.testing.assert_close(found[row], pool(together([states[row]]), queries[task])[0], rtol=0, atol=1e-12)


def test_no_texts_are_no_views():
    assert pool(TokenStates(0, ()), torch.zeros(V, D)).shape == (0, V, D)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_identical_texts_have_finite_gradients(value: float):
    states = together([torch.full((V, 3, D), value, dtype=torch.float64)] * 4)
    queries = torch.zeros(V, D, dtype=torch.float64, requires_grad=True)
    views = pool(states, queries)[None]
    examples = Examples.of(torch.tensor([[0, 0, 1, 1]]), torch.tensor([2]), torch.float64)
    z = centred(views, centre(views, examples, torch.zeros(V, D, dtype=torch.float64), torch.tensor(0.0)))
    assert z.isfinite().all()
    (gradient,) = torch.autograd.grad((z * random(*z.shape)).sum(), queries)
    assert gradient.isfinite().all()


CENTRES = [([0, 0, 0, 1], 2.5), ([0, 1], 0.0), ([2], 1.0), ([], 0.7), ([], 0.0)]


@pytest.mark.parametrize("unlabelled", [0, 3])
@pytest.mark.parametrize(("labels", "strength"), CENTRES)
def test_centre(labels: list[int], strength: float, unlabelled: int):
    views, prior, extra = random(len(labels), V, D), random(V, D, seed=2), random(unlabelled, V, D, seed=3)
    # beside another task, so that there is padding
    wide = torch.zeros(2, 6, V, D, dtype=torch.float64)
    wide[0, : len(labels)], wide[1] = views, random(6, V, D, seed=4)
    rows = torch.tensor([labels + [-1] * (6 - len(labels)), [0, 1, 2, 0, 1, 2]])
    number, share = torch.tensor(strength, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    examples = Examples.of(rows, torch.tensor([3, 3]), torch.float64)
    found = centre(wide, examples, prior, number)
    if unlabelled:
        both = torch.stack([extra, torch.zeros_like(extra)])
        there = torch.tensor([[1.0] * unlabelled, [0.0] * unlabelled], dtype=torch.float64)
        found = with_unlabelled_centre(found, examples.total + number, both, there, share)
    expected = reference.centre_of(views, labels, prior, number, extra, share)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


def test_classes_weigh_alike_in_the_centre():
    views, prior = random(1, 3, V, D), torch.zeros(V, D, dtype=torch.float64)
    examples = Examples.of(torch.tensor([[0, 0, 1]]), torch.tensor([2]), torch.float64)
    found = centre(views, examples, prior, torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(found[0], views[0, 0] / 4 + views[0, 1] / 4 + views[0, 2] / 2)


def test_centred_views_have_length_one():
    lengths = centred(random(1, 3, V, D), random(1, V, D, seed=5)).square().sum(-1).sqrt()
    assert lengths.flatten().tolist() == pytest.approx([1.0] * 3 * V)
    assert math.isfinite(float(centred(torch.ones(1, 2, V, D), torch.ones(1, V, D)).sum()))
