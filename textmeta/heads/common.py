"""What all heads share: which example is in which class, how much each weighs, and means over classes.

Shapes, here and in all of :mod:`textmeta.heads`: T tasks, n examples (padded to the largest task, label -1), C classes
(padded to the most ways), V views, d dimensions. A row whose weight is 0 takes no part: padding, examples that a fold
leaves out, or those that a user gives no weight.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import one_hot


@dataclass(frozen=True)
class Examples:
    """Which example is in which class, and how much it counts, of T tasks."""

    member: Tensor  # (T, n, C), 1 where an example is in a class; rows of 0 for padding
    weights: Tensor  # (T, n), how much each example counts; 0 for padding
    classes: Tensor  # (T, C) bool, whether a task has that class
    class_weights: Tensor | None = None  # (T, C), of an example of each class in the head; None where they weigh alike
    # made of these:
    counts: Tensor = field(init=False)  # (T, C), how much the examples of each class count together
    total: Tensor = field(init=False)  # (T,), n: how much all examples count together
    present: Tensor = field(init=False)  # (T, C) bool, the classes that have examples
    number: Tensor = field(init=False)  # (T,), C₁: how many these are; 1 at least, so that it can be divided by
    balanced: Tensor = field(init=False)  # (T, n), ω_i = n / (C₁ n_c), by which classes weigh alike; they add up to n
    row_weights: Tensor = field(init=False)  # (T, n), ω_i in the head: balanced, or by class weights; up to n, too
    targets: Tensor = field(init=False)  # (T, n, C), one-hot - 1/C₁ over the classes that have examples; else 0

    def __post_init__(self) -> None:
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
    """Return (T, …): the mean over classes of the mean of each class's values (T, …, n), by the examples' weights.

    Values are finite where the weight is 0, too; a task without examples gives 0.
    """
    share = examples.balanced / torch.where(examples.total > 0, examples.total, 1.0)[:, None]
    return (values * share.view(len(share), *[1] * (values.ndim - 2), -1)).sum(-1)


def temperature(coefficients: Tensor, shots: Tensor, ways: Tensor, stepped: Tensor, nll: Tensor) -> Tensor:
    """Return (T,) t, with log t = t₀ + t₁ log(1 + k) + t₂ log(C/5) + t₃ [steps taken] + t₄ NLL.

    It is of the coefficients (5,) t₀ … t₄, and of (T,) log(1 + k), C, whether steps were taken, and the mixture's NLL
    before them.
    """
    inputs = torch.stack([torch.ones_like(shots), shots, (ways.to(shots) / 5).log(), stepped.to(shots.dtype), nll])
    return (coefficients @ inputs).exp()


def float64(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in float64, on the CPU where their device has none; small systems are solved there exactly."""
    return tuple(t.cpu().double() if t.device.type == "mps" else t.double() for t in tensors)


def root(squares: Tensor) -> Tensor:
    """Return square roots whose derivative at 0 is 0, so that a weight of 0 has a gradient, and not infinite."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
