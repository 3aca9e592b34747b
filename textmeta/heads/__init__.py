"""From token states to logits: pure functions over T tasks at once, padded to the largest.

A head is a function of centred views (T, n, V, d), mixture (T, V), examples and λ that returns weights (T, V, d, C), by
which a text's score for class c is Σ_v z_v · W_vc; and a row of :data:`HEADS`.
"""

from collections.abc import Callable

from torch import Tensor

from textmeta.heads.common import Examples
from textmeta.heads.prototype import prototypes
from textmeta.heads.ridge import ridge

HEADS: dict[str, Callable[[Tensor, Tensor, Examples, Tensor], Tensor]] = {
    "ridge": ridge,
    "prototype": lambda views, mixture, examples, _: prototypes(views, mixture, examples),
}
