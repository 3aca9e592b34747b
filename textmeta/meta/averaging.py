"""The average of several adapters, which does better on corpora that none has seen than each of them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from textmeta.encoder.encoder import Encoder
from textmeta.encoder.lora import LORA_B
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import SettingsError
from textmeta.meta.adapter import Adapter
from textmeta.meta.initialisation import Initialisation

__all__ = ["average"]


def average(adapters: Sequence[Adapter], rank: int | None = None) -> Adapter:
    """Return the average of adapters that were trained alike, from other seeds or by other algorithms.

    The average of what their LoRA adds to each weight, as one LoRA; and of every other tensor. Nothing is calibrated.

    Source: Wortsman et al. (2022), "Model soups", uniform soup; where the rank is smaller, the nearest of that rank:
    Eckart and Young (1936), "The approximation of one matrix by another of lower rank".

    Args:
        adapters: of one encoder, with the same LoRA targets and learner settings.
        rank: of the LoRA; by default the sum of theirs, which loses nothing.

    Raises:
        SettingsError: if there are none, they do not fit together, or the rank is not from 1 to that sum.
    """
    if not adapters:
        raise SettingsError("no adapters to average")
    first = adapters[0]
    for number, other in enumerate(adapters[1:], 2):
        for what in ("weights_sha256", "lora", "learner"):
            if getattr(other, what) != getattr(first, what):
                raise SettingsError(f"adapter {number} has another {what} than the first, so they have no average")
    whole = first.lora.rank * len(adapters)
    rank = whole if rank is None else rank
    if not 1 <= rank <= whole:
        raise SettingsError(f"rank must be from 1 to {whole}, the sum of the adapters' ranks, given {rank}")
    lora = replace(first.lora, rank=rank)
    reader = TokenStateReader(Encoder(first.encoder, lora), first.learner.layers)
    shape = Initialisation.start(reader.encoder.factor_shapes, reader.encoder.hidden_size, first.learner, seed=0)
    every = [adapter.initialisation for adapter in adapters]
    plain = [replace(init, lora={}).tensors() for init in every]
    tensors = {name: torch.stack([part[name] for part in plain]).mean(0) for name in plain[0]}
    factors: dict[str, Tensor] = {}
    for name in (name for name in every[0].lora if LORA_B in name):
        down = name.replace(LORA_B, ".lora_A.")
        b = torch.cat([init.lora[name] for init in every], 1) / len(every)  # (out, whole)
        b = b * (rank / first.lora.rank)  # as LoRA's scale is alpha / rank
        a = torch.cat([init.lora[down] for init in every])  # (whole, in)
        factors[name], factors[down] = _nearest(b, a, rank)
    return Adapter.of(reader, first.learner, replace(shape.with_tensors({**shape.tensors(), **tensors}), lora=factors))


def _nearest(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (out, rank) and (rank, in) of the matrix nearest to ``b @ a``, as large as each other."""
    left, b_core = torch.linalg.qr(b.double())  # the product is never made: it may be large, and its rank is small
    right, a_core = torch.linalg.qr(a.double().T)
    u, sizes, v = torch.linalg.svd(b_core @ a_core.T)
    roots = sizes[:rank].sqrt()
    return (left @ u[:, :rank] * roots).to(b), (roots[:, None] * (v[:rank] @ right.T)).to(a)
