"""Attention that can be differentiated twice where that is asked for, and is fast everywhere else.

Fused kernels have no second derivative, and PyTorch's own switch between kernels is global to the process. Here the
choice is a context variable, read in each attention by a function that transformers calls through its registry.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from textmeta.errors import EncoderError

SWITCHED = "textmeta_switched"

_USED: ContextVar[Callable[..., Any]] = ContextVar("textmeta_attention", default=sdpa_attention_forward)


@contextmanager
def attention_by(function: Callable[..., Any]) -> Iterator[None]:
    """Let attention in this thread be made by a function of transformers' signature, until the block is left."""
    token = _USED.set(function)
    try:
        yield
    finally:
        _USED.reset(token)


def _switched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    used: Any = _USED.get()
    on_cpu = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if used is sdpa_attention_forward and on_cpu and query.requires_grad:
        # the fused kernel's backward in bfloat16 is twenty times as slow on a CPU as in float32
        with torch.autocast("cpu", enabled=False):
            output, _ = used(module, query.float(), key.float(), value.float(), attention_mask, **given)
        return output.bfloat16(), None
    return used(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Return what attention makes, (rows, length, heads, size), by operations that have a second derivative."""
    if other.get("position_bias") is not None:
        raise EncoderError(f"{type(module).__name__} has a position bias, for which there is no plain attention")
    groups = getattr(module, "num_key_value_groups", 1)  # heads that share their keys and values
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # the least finite number, not -inf: a row that may attend to nothing stays finite
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def _mask(*, attention_mask: Tensor | None, allow_is_bidirectional_skip: bool = False, **given: Any) -> Tensor | None:
    """Return transformers' mask; None where there is no padding, but for a GPU, which to look at means to wait for."""
    skip = allow_is_bidirectional_skip and (attention_mask is None or attention_mask.device.type == "cpu")
    return sdpa_mask(attention_mask=attention_mask, allow_is_bidirectional_skip=skip, **given)


AttentionInterface.register(SWITCHED, _switched_attention)
AttentionMaskInterface.register(SWITCHED, _mask)
