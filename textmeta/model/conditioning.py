"""What the task embedding decides: from which LoRA factors a task starts, and at which temperature.

The memory of K banks makes a task's start from learned parts: with task embedding z, layer group g and temperature of
routing 1 (the keys' lengths are learned),

    B⁰(τ) = B̄ + Σ_k (π_gk(τ) - 1/K) U_k,    π_g(τ) = softmax_k(z(τ) · Key_gk).

So B̄, plain LoRA, is the start at even routing: the mean of the banks. Gates are the simpler rival, for each layer l:
B⁰(τ) = (1 + tanh(z(τ) · w_l)) B̄.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from textmeta.errors import SettingsError
from textmeta.model.initialisation import LOG_TEMPERATURE, Parameters, layer_of, lora_factors
from textmeta.model.task_encoder import (
    N_STATISTICS,
    TaskEncoderSettings,
    task_encoder_shapes,
    task_encoder_start,
)

__all__ = [
    "BANK",
    "ConditioningSettings",
    "conditioned_factors",
    "conditioned_temperature",
    "conditioning_shapes",
    "conditioning_start",
    "routing",
]

BANK = "memory.bank."  # prefix; (K, out, rank) for each LoRA factor B
KEYS = "memory.keys"  # (groups, K, e)
GATES = "gates"  # (layers, e)
TASK_TEMPERATURE = "task_temperature"  # (e + 5,), of task embedding and statistics

BANK_SCALE = 0.005  # with U = 0 keys and task encoder would have no gradient
GATE_SCALE = 0.1
KEY_SCALE = 4.0  # length of a key: embeddings have length 1, so routing starts neither even nor decided
MAX_BANKS = 256


@dataclass(frozen=True)
class ConditioningSettings:
    """What the task embedding decides.

    Args:
        start: what a task's LoRA starts from: none (the same for all tasks), banks (a memory with keys), or gates (one
            number a layer on a single LoRA).
        banks: K.
        groups: groups of layers, each with a routing of its own; at most one a layer.
        temperature: whether the head's temperature is the task's own.
        task_encoder: that makes the embedding.
    """

    start: Literal["none", "banks", "gates"] = "none"
    banks: int = 4
    groups: int = 3
    temperature: bool = False
    task_encoder: TaskEncoderSettings = field(default_factory=TaskEncoderSettings)

    @property
    def decides(self) -> bool:
        """Whether the embedding has a say in anything; otherwise it is there to compare tasks by."""
        return self.start != "none" or self.temperature

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.start not in ("none", "banks", "gates"):
            raise SettingsError(f"conditioning start must be 'none', 'banks' or 'gates', given {self.start!r}")
        for name in ("banks", "groups"):
            if not 1 <= getattr(self, name) <= MAX_BANKS:
                raise SettingsError(f"conditioning {name} must be from 1 to {MAX_BANKS}, given {getattr(self, name)}")


def conditioning_shapes(
    settings: ConditioningSettings, factor_shapes: Mapping[str, tuple[int, ...]], hidden_size: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape by name of all that conditioning learns.

    Args:
        settings: what is conditioned.
        factor_shapes: shape of each LoRA factor by name.
        hidden_size: of the features.
    """
    size, layers = settings.task_encoder.size, _layers(factor_shapes)
    shapes = task_encoder_shapes(settings.task_encoder, hidden_size)
    if settings.start == "banks":
        shapes[KEYS] = (min(settings.groups, len(layers)), settings.banks, size)
        for name, shape in factor_shapes.items():
            if _is_conditioned(name):
                shapes[BANK + name] = (settings.banks, *shape)
    if settings.start == "gates":
        shapes[GATES] = (len(layers), size)
    if settings.temperature:
        shapes[TASK_TEMPERATURE] = (size + N_STATISTICS,)
    return shapes


def conditioning_start(
    settings: ConditioningSettings, factor_shapes: Mapping[str, tuple[int, ...]], hidden_size: int, seed: int = 0
) -> Parameters:
    """Return it before any learning: a memory that says little, gates half open, a temperature that is no task's own.

    Arguments as for :func:`conditioning_shapes`, and the seed of all that is random.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = task_encoder_start(settings.task_encoder, hidden_size, generator)
    for name, shape in conditioning_shapes(settings, factor_shapes, hidden_size).items():
        if name == KEYS:
            parameters[name] = KEY_SCALE * normalize(torch.randn(shape, generator=generator), dim=-1)
        elif name.startswith(BANK):
            parameters[name] = BANK_SCALE * torch.randn(shape, generator=generator)
        elif name == GATES:
            parameters[name] = GATE_SCALE * torch.randn(shape, generator=generator)
        elif name == TASK_TEMPERATURE:
            parameters[name] = torch.zeros(shape)
    return parameters


def routing(parameters: Mapping[str, Tensor], embedding: Tensor) -> Tensor:
    """Return (T, groups, K), how much of each bank a task takes, from its embedding (T, e); each row sums to 1."""
    return torch.einsum("te,gke->tgk", embedding, parameters[KEYS]).softmax(-1)


def conditioned_factors(parameters: Mapping[str, Tensor], embedding: Tensor) -> dict[str, Tensor]:
    """Return the LoRA factors B that tasks start from, (T, out, rank) by name; none, if the start is not conditioned.

    Args:
        parameters: the initialisation.
        embedding: (T, e) task embeddings.
    """
    factors = lora_factors(parameters)
    layers = _layers(factors)
    started: dict[str, Tensor] = {}
    if KEYS in parameters:
        weights = routing(parameters, embedding)
        weights = weights - 1 / weights.shape[-1]
        groups = weights.shape[1]
        for name in filter(_is_conditioned, factors):
            group = layers.index(layer_of(name)) * groups // len(layers)
            moved = torch.einsum("tk,kor->tor", weights[:, group], parameters[BANK + name])
            started[name] = factors[name] + moved
    if GATES in parameters:
        gates = 1 + torch.tanh(embedding @ parameters[GATES].T)
        for name in filter(_is_conditioned, factors):
            started[name] = gates[:, layers.index(layer_of(name)), None, None] * factors[name]
    return started


def conditioned_temperature(parameters: Mapping[str, Tensor], embedding: Tensor, statistics: Tensor) -> Tensor:
    """Return the temperature of each task, (T,), or one for all, ().

    log t(τ) = log t̄ + w · [z(τ), statistics(τ)].

    Args:
        parameters: the initialisation.
        embedding: (T, e) task embeddings.
        statistics: (T, 5), of :func:`~textmeta.model.task_encoder.task_statistics`.
    """
    log = parameters[LOG_TEMPERATURE]
    if TASK_TEMPERATURE in parameters:
        log = log + torch.cat([embedding, statistics], 1) @ parameters[TASK_TEMPERATURE]
    return log.exp()


def _is_conditioned(factor: str) -> bool:
    return ".lora_B." in factor  # A is what all tasks share


def _layers(factors: Iterable[str]) -> list[str]:
    """Return the layers that carry LoRA, from the lowest to the highest."""
    names = {layer_of(name) for name in factors}
    # names may be anybody's: only what can be a layer's number counts as one
    return sorted(names, key=lambda name: ([int(n) for n in name.split(".") if re.fullmatch("[0-9]{1,6}", n)], name))
