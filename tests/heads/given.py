"""What the tests of heads are given: random numbers, and padded examples, in float64."""

import torch
from torch import Tensor

from textmeta.heads.common import Examples


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def examples_of(labels: list[list[int]], ways: list[int]) -> Examples:
    width = max(map(len, labels))
    rows = [part + [-1] * (width - len(part)) for part in labels]
    return Examples.of(torch.tensor(rows, dtype=torch.long), torch.tensor(ways), torch.float64)
