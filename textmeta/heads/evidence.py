"""Evidence: how well parts of a support set are told by the rest, on each view; and the mixture of views that follows.

Folds leave out one part of *every* class together. Leaving out one example alone is dishonest here: centred features
and centred targets both sum to zero, so the others tell the class of the one that is missing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from textmeta.heads.common import Examples, float64, mean_over_classes
from textmeta.heads.pooling import LENGTH_EPSILON, centre, centred
from textmeta.heads.ridge import dual_coefficients, primal_weights

MOST_FOLDS = 10


@dataclass(frozen=True)
class Folds:
    """Which examples are left out together, of T tasks."""

    of: Tensor  # (T, n) int64, the fold that leaves an example out; -1 for those of classes that have no others
    examples: Examples  # those of classes with two examples or more; the others' weights are 0
    any: Tensor  # (T,) bool, whether there are two such classes; without, there is no evidence
    number: int  # the most folds of any task


def folds_of(examples: Examples) -> Folds:
    """Split each class with two examples or more into K near-equal parts, in the order of the rows.

    K = min(10, the fewest examples of such a class).
    """
    counted = examples.member * (examples.weights > 0).to(examples.member.dtype)[..., None]
    counts = counted.sum(1)  # (T, C)
    several = counts >= 2
    enough = several.sum(1) >= 2
    several = several & enough[:, None]
    smallest = torch.where(several, counts, torch.inf).amin(1)
    number = torch.where(enough, smallest.clamp(max=MOST_FOLDS), 1).long()
    position = ((counted.cumsum(1) - counted) * counted).sum(-1).long()  # among those of its class
    taking_part = (counted * several[:, None]).sum(-1) > 0
    of = torch.where(taking_part, position % number[:, None], -1)
    most = int(of.max()) + 1 if of.numel() else 0
    return Folds(of, examples.weighted(taking_part.to(examples.weights.dtype)), enough, most)


def left_out_scores(
    views: Tensor, folds: Folds, prior: Tensor, strength: Tensor, penalty: Tensor, mixed: Tensor | None = None
) -> Tensor:
    """Return (T, M, n, C) float64: of each example the scores by ridge regressions that have not seen its fold.

    Centre and weights are made anew from what stays; an example of no fold has scores of 0. By default there is a
    regression on each view alone, M = V; with ``mixed`` (T, V), the weights of the views, one, M = 1. Views (T, n, V,
    d) are of length 1, not centred; μ is the prior (V, d), n₀ the strength (), λ the penalty ().
    """
    views, prior, strength, penalty = float64(views, prior, strength, penalty)
    mixed = None if mixed is None else float64(mixed)[0]
    tasks, n, v, d = views.shape
    scores = views.new_zeros(tasks, v if mixed is None else 1, n, folds.examples.member.shape[-1])
    if not folds.number:  # nothing is left out where every class has one example
        return scores
    # products of many texts would take more memory than the texts themselves
    make = _dual_scores if n <= v * d else _primal_scores
    solve = make(views, prior, strength, penalty, mixed)
    of, classes = folds.of.to(views.device), folds.examples.classes.to(views.device)
    member, weights = float64(folds.examples.member, folds.examples.weights)
    examples = Examples(member, weights, classes)
    for fold in range(folds.number):
        left_out = of == fold
        rest = examples.weighted((~left_out).to(views.dtype))
        scores = torch.where(left_out[:, None, :, None], solve(rest), scores)
    return scores


def _dual_scores(
    views: Tensor, prior: Tensor, strength: Tensor, penalty: Tensor, mixed: Tensor | None
) -> Callable[[Examples], Tensor]:
    """Return what makes scores (T, M, n, C) of some of the examples, from the products of all views.

    Kernels of centred views follow from these, so the views are read once, whatever the number of folds.
    """
    grams = torch.einsum("tnvd,tmvd->tvnm", views, views)
    with_prior = torch.einsum("tnvd,vd->tvn", views, prior)
    prior_square = prior.square().sum(-1)  # (V,)

    def scores(rest: Examples) -> Tensor:
        balanced = rest.balanced
        number = rest.total + strength
        number = torch.where(number > 0, number, 1.0)[:, None]
        # products of all views with the centre m = (Σ ω u + n₀ μ) / (n + n₀), and of the centre with itself
        product = torch.einsum("tvnm,tm->tvn", grams, balanced)
        of_prior = torch.einsum("tvn,tn->tv", with_prior, balanced)
        along = (product + strength * with_prior) / number[..., None]
        own = torch.einsum("tvn,tn->tv", product, balanced) + 2 * strength * of_prior + strength**2 * prior_square
        own = (own / number**2)[..., None]
        square = (grams.diagonal(dim1=-2, dim2=-1) - 2 * along + own).clamp(min=0)
        scale = (square + LENGTH_EPSILON).rsqrt()
        kernels = grams - along[..., None] - along[..., None, :] + own[..., None]
        kernels = kernels * scale[..., None] * scale[..., None, :]
        if mixed is not None:
            kernels = torch.einsum("tv,tvij->tij", mixed, kernels)[:, None]
        return kernels @ dual_coefficients(kernels, rest.targets[:, None], rest.balanced[:, None], penalty)

    return scores


def _primal_scores(
    views: Tensor, prior: Tensor, strength: Tensor, penalty: Tensor, mixed: Tensor | None
) -> Callable[[Examples], Tensor]:
    """Return the same as :func:`_dual_scores`, from the views themselves."""

    def scores(rest: Examples) -> Tensor:
        z = centred(views, centre(views, rest, prior, strength))
        if mixed is not None:
            z = (z * mixed.clamp(min=1e-12).sqrt()[:, None, :, None]).flatten(2)[:, :, None]
        design = z.transpose(1, 2)  # (T, M, n, D)
        return design @ primal_weights(design, rest.targets[:, None], rest.balanced[:, None], penalty)

    return scores


def fold_nll(scores: Tensor, folds: Folds, scale: Tensor) -> Tensor:
    """Return (T, M) the mean over classes of the mean cross entropy of left-out examples; log C where there are none.

    Their :func:`left_out_scores` (T, M, n, C) are multiplied by the scale ().
    """
    examples = folds.examples
    scores = scores.to(scale)
    logits = (scale * scores).masked_fill(~examples.present[:, None, None], -torch.inf)
    logits = torch.where(folds.any[:, None, None, None], logits, 0.0)  # rows of -inf alone have no softmax
    own = (examples.weights > 0)[:, None] & folds.any[:, None, None]
    label = examples.member.argmax(-1)[:, None, :, None].expand(-1, scores.shape[1], -1, 1)
    chosen = log_softmax(logits, -1).gather(-1, label)
    nll = mean_over_classes(-torch.where(own, chosen[..., 0], 0.0), examples).to(examples.weights.dtype)
    return torch.where(folds.any[:, None], nll, examples.classes.sum(1, keepdim=True).to(nll).log())


def mixture(prior: Tensor, strength: Tensor, half: Tensor, nll: Tensor, folds: Folds) -> Tensor:
    """Return (T, V) w = softmax(a_v - β s NLL_v) with s = n₂ / (n₂ + n_s): the more examples, the more evidence counts.

    It is of the prior (V,) a, the strength () β, the half () n_s > 0, the NLL (T, V) of each view alone, and the n₂
    examples that take part in the folds.
    """
    number = folds.examples.total
    return (prior - strength * (number / (number + half))[:, None] * nll).softmax(-1)
