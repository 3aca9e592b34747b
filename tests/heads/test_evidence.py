import math

import pytest
import torch
from torch import Tensor

from tests.heads import reference
from tests.heads.given import examples_of, random
from textmeta.heads.common import Examples
from textmeta.heads.evidence import Folds, fold_nll, folds_of, left_out_scores

V, D = 2, 5
EXACT = {"rtol": 0.0, "atol": 1e-9}


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# 11 and 12: ten folds; 3; 2; of classes 0 and 2 alone; none: of one class, of one example each, of nothing
TASKS = [
    [0, 1] * 11 + [0],
    [0, 1, 0, 2, 1, 0, 2, 1, 2, 2],
    [1, 1, 1, 0, 0],
    [2, 0, 3, 2, 0, 0],
    [0, 0, 1],
    [0, 1, 2],
    [],
]
WAYS = [2, 3, 2, 5, 3, 4, 3]


@pytest.mark.parametrize("d", [D, 30], ids=["primal", "dual"])
@pytest.mark.parametrize("alone", [True, False])
def test_evidence_is_a_plain_refit_of_each_fold(alone: bool, d: int):
    views = reference.unit(random(len(TASKS), 23, V, d))
    mixed = random(len(TASKS), V, seed=1).softmax(-1)
    prior, strength, penalty, scale = random(V, d, seed=5), number(1.5), number(0.8), number(6.0)
    folds = folds_of(examples_of(TASKS, WAYS))
    scores = left_out_scores(views, folds, prior, strength, penalty, None if alone else mixed)
    nll = fold_nll(scores, folds, scale)
    for task, labels in enumerate(TASKS):
        for m, w in enumerate(torch.eye(V, dtype=torch.float64) if alone else mixed[None, task]):
            numbers = (prior, strength, penalty, scale)
            expected, several, loss = reference.fold_evidence(views[task], labels, WAYS[task], w, numbers)
            for row, one in expected.items():
                torch.testing.assert_close(scores[task, m, row, several], one, **EXACT)
            torch.testing.assert_close(nll[task, m], loss, **EXACT)


def macro_accuracy(views: Tensor, examples: Examples, folds: Folds) -> Tensor:
    """Return (T,): how many left-out examples a class are told, mean over the classes of two examples or more."""
    prior = torch.zeros(1, views.shape[-1], dtype=torch.float64)
    scores = left_out_scores(views, folds, prior, number(0.0), number(1.0))[:, 0]
    several = examples.member.sum(1) >= 2
    told = scores.masked_fill(~several[:, None], -torch.inf).argmax(-1) == examples.member.argmax(-1)
    right = torch.einsum("tn,tnc->tc", told.double(), examples.member) / examples.member.sum(1)
    return torch.where(several, right, 0.0).sum(1) / several.sum(1)


@pytest.mark.parametrize("sizes", [(5, 5, 5, 5, 5), (2, 10), (2, 4, 6, 8, 10), (1, 1, 5, 5)], ids=str)
def test_random_labels_give_chance(sizes: tuple[int, ...]):
    tasks, labels = 300, [c for c, size in enumerate(sizes) for _ in range(size)]
    views = reference.unit(random(tasks, len(labels), 1, 64, seed=3))
    examples = examples_of([labels] * tasks, [len(sizes)] * tasks)
    several = sum(size >= 2 for size in sizes)
    folds = folds_of(examples)
    found = macro_accuracy(views, examples, folds)
    error = float(found.std()) / math.sqrt(tasks)
    assert abs(float(found.mean()) - 1 / several) < 3.29 * error  # 99.9 %
    assert 3.29 * error < 0.05
