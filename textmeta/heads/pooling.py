"""Views: a layer's token states pooled by a query, scaled to length 1, and centred."""

import math

import torch
from torch import Tensor

from textmeta.encoder.token_states import TokenStates
from textmeta.heads.common import Examples

LENGTH_EPSILON = 1e-12


def pool(states: TokenStates, queries: Tensor, row_task: Tensor | None = None) -> Tensor:
    """Pool the tokens of each of N texts by a query a view, and scale the result to length 1.

    p_ℓ(x) = Σ_t softmax_t(q_ℓ · ĥ_ℓt / √d) h_ℓt with ĥ = h / √(mean(h²) + 1e-6), then u = p / √(|p|² + 1e-12). A query
    of zeros is mean pooling. Of a text that is read in windows p is the mean of theirs.

    Queries are (V, d) for all texts, or (T, V, d), one a task: then each text is pooled by that of its ``row_task``
    (N,), or by all, which gives (T, N, V, d); else it is (N, V, d).
    """
    if not states.batches:
        return queries.new_zeros(*queries.shape[:-2][: row_task is None], 0, *queries.shape[-2:])
    parts = []
    for batch in states.batches:
        hidden = batch.states  # (r, V, L, d)
        if queries.ndim == 3 and row_task is None:
            found = torch.einsum("rvld,tvd->trvl", hidden, queries)
        else:
            own = queries if row_task is None else queries.index_select(0, row_task[batch.rows])
            found = (hidden @ own[..., None])[..., 0]
        scores = found * batch.inverse_rms / math.sqrt(hidden.shape[-1])  # (r, V, L), or (T, r, V, L)
        attention = scores.masked_fill(~batch.mask[:, None], -torch.inf).softmax(-1)
        if attention.ndim == 4:
            parts.append(torch.einsum("trvl,rvld->trvd", attention, hidden))
        else:
            parts.append((attention[..., None, :] @ hidden)[..., 0, :])
    rows, pooled = torch.cat([batch.rows for batch in states.batches]), torch.cat(parts, -3)
    # of a text in windows the sum of theirs, which is their mean once its length is 1
    pooled = pooled.new_zeros(*pooled.shape[:-3], states.count, *pooled.shape[-2:]).index_add(-3, rows, pooled)
    return pooled * (pooled.square().sum(-1, keepdim=True) + LENGTH_EPSILON).rsqrt()


def centre(views: Tensor, examples: Examples, prior: Tensor, strength: Tensor) -> Tensor:
    """Return (T, V, d) m = (n c̄ + n₀ μ) / (n + n₀): the mean of the class means, drawn to a learned one.

    Views are (T, n, V, d), the prior μ (V, d), its strength n₀ (). 0 where n + n₀ is 0.
    """
    total = torch.einsum("tn,tnvd->tvd", examples.balanced, views) + strength * prior
    return _divided(total, examples.total + strength)


def with_unlabelled_centre(middle: Tensor, number: Tensor, unlabelled: Tensor, there: Tensor, share: Tensor) -> Tensor:
    """Return the centre (T, V, d) that unlabelled texts have joined: the mean of all, each weighing ν = ``share``.

    The centre without them weighs ``number`` (T,) n + n₀; their views are (T, r, V, d), and ``there`` (T, r) is 0 for
    padding.
    """
    total = number[:, None, None] * middle + share * torch.einsum("tr,trvd->tvd", there, unlabelled)
    return _divided(total, number + share * there.sum(1))


def centred(views: Tensor, middle: Tensor) -> Tensor:
    """Return (T, n, V, d) z = (u - m) / √(|u - m|² + 1e-12), of views (T, n, V, d) and centres (T, V, d)."""
    return to_length_one(views - middle[:, None])


def to_length_one(vectors: Tensor) -> Tensor:
    """Return vectors (…, d) scaled to length 1; near 0 they stay near 0."""
    return vectors * (vectors.square().sum(-1, keepdim=True) + LENGTH_EPSILON).rsqrt()


def _divided(total: Tensor, number: Tensor) -> Tensor:
    positive = number > 0
    return torch.where(positive[:, None, None], total / torch.where(positive, number, 1.0)[:, None, None], 0.0)
