import pytest
import torch
from torch import Tensor

from tests.heads import reference
from tests.heads.given import examples_of, random
from textmeta.heads.evidence import fold_nll, folds_of, left_out_scores

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
