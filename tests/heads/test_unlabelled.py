import math

import pytest
import torch
from torch import Tensor

from tests.heads import reference
from tests.heads.given import examples_of, random
from textmeta.heads.common import Examples, log_shots
from textmeta.heads.ridge import ridge
from textmeta.heads.unlabelled import soft_labelled_ridge, soft_labels, unlabelled_weight

V, D, T_SCALE = 2, 5, 4.0
PENALTY = torch.tensor(0.7, dtype=torch.float64)


LABELS, WAYS = [[0, 0, 1], [0, 1, 2, 2], []], [2, 3, 3]
CROWD = [4, 2, 3]


def setting() -> tuple[Tensor, Tensor, Tensor, Tensor, Examples, Tensor, Tensor]:
    views, extra = reference.unit(random(3, 4, V, D)), reference.unit(random(3, 4, V, D, seed=1))
    there = (torch.arange(4) < torch.tensor(CROWD)[:, None]).double()
    mixture, names = random(3, V, seed=2).softmax(-1), random(3, 4, 3, seed=3)
    share = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    return views, extra, there, mixture, examples_of(LABELS, WAYS), names, share


def run(rounds: int) -> Tensor:
    views, extra, there, mixture, examples, names, share = setting()
    start = ridge(views, mixture, examples, PENALTY)

    def logits(w: Tensor) -> Tensor:
        return T_SCALE * torch.einsum("trvd,tvdc->trc", extra, w) + names

    return soft_labelled_ridge(start, views, extra, there, mixture, examples, PENALTY, share, logits, rounds)


def test_no_round_is_the_ridge():
    views, _, _, mixture, examples, _, _ = setting()
    assert torch.equal(run(0), ridge(views, mixture, examples, PENALTY))


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_are_a_plain_loop_with_no_labelled_example_too(rounds: int):
    views, extra, _, mixture, _, names, share = setting()
    found = run(rounds)
    for task, labels in enumerate(LABELS):
        n, ways = len(labels), WAYS[task]
        z, zr = views[task, :n], extra[task, : CROWD[task]]
        fitted = torch.zeros(V, D, ways, dtype=torch.float64)
        if n:
            targets, omega = reference.one_hot_targets(labels, ways), reference.balanced_weights(labels)
            fitted = reference.ridge_fit(z, mixture[task], targets, omega, PENALTY)
        hard = torch.zeros(n, ways, dtype=torch.float64)
        hard[range(n), labels] = 1
        for _ in range(rounds):
            scores = T_SCALE * torch.einsum("rvd,vdc->rc", zr, fitted) + names[task, : CROWD[task], :ways]
            p = scores.softmax(-1)
            confidence = 1 + (p * p.log()).sum(-1) / math.log(ways)
            omega = torch.cat([reference.balanced_weights(labels), share[task] * confidence])
            targets = torch.cat([hard, p]) - 1 / ways
            fitted = reference.ridge_fit(torch.cat([z, zr]), mixture[task], targets, omega, PENALTY)
        torch.testing.assert_close(found[task, ..., :ways], fitted, rtol=0, atol=1e-6)
        assert not found[task, ..., ways:].any()


def test_confidence_is_from_none_to_full():
    logits = torch.tensor([[[0.0, 0.0, 0.0], [200.0, 0.0, 5.0]], [[1.0, 1.0, 50.0], [0.0, -200.0, 50.0]]]).double()
    classes = torch.tensor([[True, True, True], [True, True, False]])
    probabilities, confidence = soft_labels(logits.requires_grad_(), classes)
    expected = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(confidence, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    assert not probabilities[1, :, 2].any()
    assert torch.autograd.grad(confidence.sum(), logits)[0].isfinite().all()


def test_one_class_has_nothing_to_doubt():
    probabilities, confidence = soft_labels(
        torch.zeros(1, 2, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    )
    assert probabilities.flatten().tolist() == [1.0, 1.0]
    assert confidence.flatten().tolist() == [1.0, 1.0]


def test_weight_of_unlabelled_texts():
    examples = examples_of(LABELS, WAYS)
    r = torch.tensor([math.log(0.3), 0.5, -0.25], dtype=torch.float64)
    found = unlabelled_weight(r, log_shots(examples), examples, torch.tensor(CROWD).double())
    shots = [1.5, 4 / 3, 0]
    for task in range(3):
        crowd = CROWD[task] / (len(LABELS[task]) + WAYS[task])
        assert float(found[task]) == pytest.approx(0.3 * (1 + shots[task]) ** 0.5 * (1 + crowd) ** -0.25)
