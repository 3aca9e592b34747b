"""Out of scope: the probability that a text belongs to any of a task's classes, by a logistic function."""

import torch
from torch import Tensor

__all__ = ["SCOPE_INPUTS", "scope_inputs", "scope_probability"]

SCOPE_INPUTS = (
    "largest probability",
    "nearest class mean",
    "nearest name",
    "has names",
    "nll",
    "log shots",
    "log ways",
)


def scope_inputs(
    logits: Tensor, to_means: Tensor, to_names: Tensor, has_names: Tensor, nll: Tensor, shots: Tensor, ways: Tensor
) -> Tensor:
    """Return (T, n, 7) of each text what its scope is told by, in the order of :data:`SCOPE_INPUTS`.

    Of the texts these are logits and cosines to the class means and to the names, (T, n, C), -inf for a class without;
    of the tasks (T,) whether there are names, the mixture's NLL, log(1 + k) and C.
    """
    largest = logits.softmax(-1).amax(-1)
    nearest = [torch.nan_to_num(part.amax(-1), neginf=0.0) for part in (to_means, to_names)]
    task = torch.stack([has_names.to(nll), nll, shots, ways.to(nll).log()], -1)  # (T, 4)
    return torch.cat([torch.stack([largest, *nearest], -1), task[:, None].expand(-1, largest.shape[1], -1)], -1)


def scope_probability(rule: Tensor, inputs: Tensor) -> Tensor:
    """Return (T, n) probabilities, from the rule (8,), whose last number is the constant, and inputs (T, n, 7)."""
    return (inputs @ rule[:-1] + rule[-1]).sigmoid()
