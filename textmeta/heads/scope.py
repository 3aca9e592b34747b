"""Out of scope: the probability that a text belongs to any of a task's classes, by a logistic function."""

from torch import Tensor


def scope_probability(rule: Tensor, inputs: Tensor) -> Tensor:
    """Return (T, n) probabilities, from the rule (8,), whose last number is the constant, and inputs (T, n, 7)."""
    return (inputs @ rule[:-1] + rule[-1]).sigmoid()
