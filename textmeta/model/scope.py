"""What is out of scope: a rule on a text's logits, and on what its task is like, for the probability to be of no class.

A text that belongs to a class lies near it and much nearer than to the others; how near is typical depends on the task.
The rule is a logistic regression on both, fitted over episodes with left-out classes
(:mod:`textmeta.meta.calibration`). Energy, one of its inputs, is of Liu et al. (2020), "Energy-based
Out-of-distribution Detection".
"""

import torch
from torch import Tensor

__all__ = ["RULE_SIZE", "TASK_INPUTS", "TEXT_INPUTS", "rule_of_task", "scope_probability", "task_inputs", "text_inputs"]

TEXT_INPUTS = ("nearest", "margin", "energy")
TASK_INPUTS = ("left_out_own", "has_left_out", "log_shots", "log_ways")
RULE_SIZE = len(TEXT_INPUTS) + len(TASK_INPUTS) + 1  # coefficients of both, and a constant


def text_inputs(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return (n, 3) of each text: its largest product with a class, that less the second largest, and the energy.

    Args:
        logits: (n, C), at least 2 classes.
        temperature: (), in the logits; the products are the logits without it.
    """
    products = logits / temperature
    largest = products.topk(2, dim=-1).values
    energy = logits.logsumexp(-1) / temperature
    return torch.stack([largest[:, 0], largest[:, 0] - largest[:, 1], energy], dim=1)


def task_inputs(left_out: Tensor, labels: Tensor, counts: Tensor, size: Tensor, temperature: Tensor) -> Tensor:
    """Return (4,) of a task, in the order of :data:`TASK_INPUTS`.

    The first is the mean product of an example with its class without it; 0, where no example has company.

    Args:
        left_out: (n, C) leave-one-out logits of the support set.
        labels: (n,).
        counts: (n,) bool, which of them count.
        size: (2,) (:func:`textmeta.meta.adaptation.task_size`).
        temperature: (), in the logits.
    """
    known = counts.any()
    own = left_out.gather(1, labels.clamp(min=0)[:, None])[:, 0] / temperature
    mean = torch.where(counts, own, 0.0).sum() / counts.sum().clamp(min=1)
    return torch.stack([mean, known.to(mean.dtype), *size.to(mean.dtype)])


def rule_of_task(rule: Tensor, inputs: Tensor) -> Tensor:
    """Return (4,): the rule (8,) for one task, whose own inputs (4,) have become part of the constant."""
    texts, tasks = len(TEXT_INPUTS), len(TASK_INPUTS)
    constant = rule[texts : texts + tasks] @ inputs + rule[-1]
    return torch.cat([rule[:texts], constant[None]])


def scope_probability(rule: Tensor, inputs: Tensor) -> Tensor:
    """Return (n,) the probability to be of one of the classes, where as many texts are as are not.

    Args:
        rule: (4,), of the task (:func:`rule_of_task`).
        inputs: (n, 3), of the texts (:func:`text_inputs`).
    """
    return (inputs @ rule[:-1] + rule[-1]).sigmoid()
