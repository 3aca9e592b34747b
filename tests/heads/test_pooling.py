import pytest
import torch
from torch import Tensor

from tests.heads.given import random
from textmeta.encoder.token_states import StateBatch, TokenStates
from textmeta.heads.common import Examples
from textmeta.heads.pooling import centre, centred, pool

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


def test_neither_padding_nor_batches_change_anything():
    states, queries = texts(2, 7, 4, 9, 1), random(V, D)
    expected = pool(together(states), queries)
    for other in (together(states, longer=5), TokenStates.padded(states, max_tokens=10), TokenStates.padded(states)):
        torch.testing.assert_close(pool(other, queries), expected, rtol=0, atol=1e-12)
    chosen = TokenStates.padded(states, max_tokens=10).where(torch.tensor([3, 0, 4]))
    torch.testing.assert_close(pool(chosen, queries), expected[[3, 0, 4]], rtol=0, atol=1e-12)


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
