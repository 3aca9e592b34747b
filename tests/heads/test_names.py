import math

import pytest
import torch

from tests.heads import reference
from tests.heads.given import examples_of, random
from textmeta.heads.common import temperature
from textmeta.heads.names import name_evidence, name_gate, name_scores
from textmeta.heads.scope import SCOPE_INPUTS, scope_inputs, scope_probability

V, D = 2, 5


def test_scores_are_cosines_of_centred_views():
    texts, names = reference.unit(random(2, 3, V, D)), reference.unit(random(2, 4, V, D, seed=1))
    weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    found = name_scores(texts, names, weights)
    for t in range(2):
        for i in range(3):
            for c in range(4):
                expected = sum(weights[v] * texts[t, i, v] @ names[t, c, v] for v in range(V))
                torch.testing.assert_close(found[t, i, c], expected)
    torch.testing.assert_close(name_scores(texts, texts, weights)[0, 0, 0], torch.ones((), dtype=torch.float64))


def test_evidence_is_what_names_know_beyond_chance():
    labels = [[0, 0, 0, 1, 2, 2], [1, 0, 1], []]
    ways = [4, 2, 3]
    logits = 3 * random(3, 6, 4)
    found = name_evidence(logits, examples_of(labels, ways))
    for task in range(2):
        n = len(labels[task])
        losses = -logits[task, :n, : ways[task]].log_softmax(-1)[range(n), labels[task]]
        expected = math.log(ways[task]) - reference.class_mean(losses, labels[task])
        torch.testing.assert_close(found[task], expected, rtol=0, atol=1e-6)
    assert float(found[2]) == 0
    assert name_evidence(torch.zeros_like(logits), examples_of(labels, ways)).tolist() == pytest.approx(
        [0, 0, 0], abs=1e-6
    )


def test_names_that_know_count_more_and_never_below_zero():
    examples = examples_of([[0, 0, 1, 1]] * 2 + [[0, 1] * 20] * 2, [2] * 4)
    b = torch.tensor([-1.0, 0.2, -0.4], dtype=torch.float64)
    evidence = torch.tensor([0.5, -2.0, 0.5, -2.0], dtype=torch.float64)
    found = name_gate(b, evidence, examples)
    for task, (n, k) in enumerate([(4, 2), (4, 2), (40, 20), (40, 20)]):
        expected = math.exp(-1 + 0.2 * float(evidence[task]) * math.sqrt(min(n, 25)) - 0.4 * math.log(k))
        assert float(found[task]) == pytest.approx(expected)


def test_temperature():
    t = torch.tensor([2.0, -0.3, 0.4, 0.25, -0.1], dtype=torch.float64)
    shots = torch.tensor([0.0, math.log(6)], dtype=torch.float64)
    nll = torch.tensor([1.1, 0.6], dtype=torch.float64)
    found = temperature(t, shots, torch.tensor([3, 10]), torch.tensor([False, True]), nll)
    first = math.exp(2 + 0.4 * math.log(3 / 5) - 0.11)
    second = math.exp(2 - 0.3 * math.log(6) + 0.4 * math.log(2) + 0.25 - 0.06)
    assert found.tolist() == pytest.approx([first, second], rel=1e-6)


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
