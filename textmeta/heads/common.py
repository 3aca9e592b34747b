"""What all heads share: which example is in which class, how much each weighs, and means over classes.

Shapes, here and in all of :mod:`textmeta.heads`: T tasks, n examples (padded to the largest task, label -1), C classes
(padded to the most ways), V views, d dimensions. A row whose weight is 0 takes no part: padding, examples that a fold
leaves out, or those that a user gives no weight.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["Examples", "float64", "log_shots", "mean_over_classes", "root", "temperature"]


@dataclass(frozen=True)
class Examples:
    """Which example is in which class, and how much it counts, of T tasks.

    Args:
        member: (T, n, C), 1 where an example is in a class; rows of 0 for padding.
        weights: (T, n), how much each example counts; 0 for padding.
        classes: (T, C) bool, whether a task has that class.
        class_weights: (T, C), how much an example of each class counts in the head; None where classes weigh alike.

    Attributes:
        counts: (T, C), how much the examples of each class count together.
        total: (T,), n: how much all examples count together.
        present: (T, C) bool, the classes that have examples.
        number: (T,), C₁: number of classes that have examples; 1 at least, so that it can be divided by.
        balanced: (T, n), ω_i = n / (C₁ n_c): weights by which classes weigh alike, and which add up to n.
        row_weights: (T, n), ω_i in the head: balanced, or by weights and class weights; they add up to n, too.
        targets: (T, n, C), one-hot - 1/C₁ over the classes that have examples; 0 for other classes and for padding.
    """

    member: Tensor
    weights: Tensor
    classes: Tensor
    class_weights: Tensor | None = None
    counts: Tensor = field(init=False)
    total: Tensor = field(init=False)
    present: Tensor = field(init=False)
    number: Tensor = field(init=False)
    balanced: Tensor = field(init=False)
    row_weights: Tensor = field(init=False)
    targets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Make what every head asks for."""
        member, weights = self.member, self.weights
        counts = (member * weights[..., None]).sum(1)
        present = counts > 0
        total = weights.sum(1)
        number = present.to(member.dtype).sum(1).clamp(min=1)
        share = torch.where(present, 1 / torch.where(present, counts, 1.0), 0.0)  # (T, C)
        balanced = weights * torch.einsum("tnc,tc->tn", member, share) * (total / number)[:, None]
        rows = balanced
        if self.class_weights is not None:
            given = weights * torch.einsum("tnc,tc->tn", member, self.class_weights)
            rows = given * (total / torch.where(total > 0, given.sum(1), 1.0))[:, None]
        there = (weights > 0).to(member.dtype)[..., None]
        targets = there * (member - present[:, None].to(there) / number[:, None, None])
        made = {"counts": counts, "present": present, "total": total, "number": number}
        for name, value in {**made, "balanced": balanced, "row_weights": rows, "targets": targets}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, labels: Tensor, ways: Tensor, dtype: torch.dtype) -> "Examples":
        """Make them of labels (T, n), -1 for padding, and ways (T,); every example counts 1."""
        most = int(ways.max())
        member = one_hot(labels.clamp(min=0), most).to(dtype) * (labels >= 0)[..., None]
        return cls(member, member.sum(-1), torch.arange(most, device=ways.device) < ways[:, None])

    def weighted(self, weights: Tensor) -> "Examples":
        """Return the same examples with their weights (T, n) times these."""
        return Examples(self.member, self.weights * weights, self.classes, self.class_weights)


def log_shots(examples: Examples) -> Tensor:
    """Return (T,) log(1 + k), with k = n / C₁ examples a class; 0 at zero shots."""
    return (examples.total / examples.number).log1p()


def mean_over_classes(values: Tensor, examples: Examples) -> Tensor:
    """Return (T, …): the mean over classes of the mean of each class's values, by the examples' weights.

    Args:
        values: (T, …, n) of each example, finite where its weight is 0 too.
        examples: of the T tasks; a task without any gives 0.
    """
    share = examples.balanced / torch.where(examples.total > 0, examples.total, 1.0)[:, None]
    return (values * share.view(len(share), *[1] * (values.ndim - 2), -1)).sum(-1)


def temperature(coefficients: Tensor, shots: Tensor, ways: Tensor, stepped: Tensor, nll: Tensor) -> Tensor:
    """Return (T,) t, with log t = t₀ + t₁ log(1 + k) + t₂ log(C/5) + t₃ [steps taken] + t₄ NLL.

    Args:
        coefficients: (5,) t₀ … t₄.
        shots: (T,) log(1 + k).
        ways: (T,) C.
        stepped: (T,) whether the inner loop took steps.
        nll: (T,) of the mixture before the steps.
    """
    inputs = torch.stack([torch.ones_like(shots), shots, (ways.to(shots) / 5).log(), stepped.to(shots.dtype), nll])
    return (coefficients @ inputs).exp()


def float64(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in float64, on the CPU where their device has none; small systems are solved there exactly."""
    return tuple(t.cpu().double() if t.device.type == "mps" else t.double() for t in tensors)


def root(squares: Tensor) -> Tensor:
    """Return square roots whose derivative at 0 is 0, where that of the root is infinite.

    So a weight of 0 has a gradient, and g / (root(mean(g²)) + ε) has its own at g = 0, 1 / ε.
    """
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
