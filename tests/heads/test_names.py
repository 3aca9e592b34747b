import math

import pytest
import torch

from tests.heads.given import random
from textmeta.heads.scope import SCOPE_INPUTS, scope_inputs, scope_probability

V, D = 2, 5


@pytest.mark.parametrize("texts", [0, 3])
def test_scope_inputs_are_finite_at_zero_shots_and_without_names(texts: int):
    nothing = torch.full((2, texts, 3), -torch.inf, dtype=torch.float64)
    logits = random(2, texts, 3)
    logits[1, :, 2] = -torch.inf  # two ways
    means = nothing.clone()
    means[1, :, 0], means[1, :, 1] = 0.4, -0.2
    shots, ways, nll = torch.tensor([0.0, 0.7]), torch.tensor([3, 2]), torch.tensor([1.1, 0.5]).double()
    found = scope_inputs(logits, means, nothing, torch.tensor([False, False]), nll, shots.double(), ways)
    assert found.shape == (2, texts, len(SCOPE_INPUTS))
    assert found.isfinite().all()
    if texts:
        torch.testing.assert_close(found[..., 0], logits.softmax(-1).amax(-1))
        assert found[0, 0, 1:].tolist() == pytest.approx([0, 0, 0, 1.1, 0, math.log(3)])
        assert found[1, 0, 1:].tolist() == pytest.approx([0.4, 0, 0, 0.5, 0.7, math.log(2)])
    rule = random(len(SCOPE_INPUTS) + 1)
    probabilities = scope_probability(rule, found)
    torch.testing.assert_close(probabilities, (found @ rule[:-1] + rule[-1]).sigmoid())
