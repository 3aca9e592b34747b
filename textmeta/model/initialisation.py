"""The initialisation: everything that meta-learning learns, as one flat dictionary of named tensors.

Flat, so that a meta-gradient, an optimiser's moments and a checkpoint are dictionaries of the same names.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from textmeta.model.lora import zero_start

__all__ = [
    "LOG_NAME_WEIGHT",
    "LOG_RIDGE",
    "LOG_STEP_SIZE",
    "LOG_TEMPERATURE",
    "LORA",
    "OFFSET",
    "Parameters",
    "StepSizesPer",
    "head_scalars",
    "initial_parameters",
    "is_scalar",
    "layer_of",
    "lora_factors",
    "step_size_groups",
    "step_sizes",
]

Parameters = dict[str, Tensor]
StepSizesPer = Literal["part", "layer", "tensor"]

LORA = "lora."  # prefix of the LoRA factors' names
OFFSET = "offset"  # the head's offset: adapted, but never learned, since it starts from 0 in every task
LOG_TEMPERATURE = "log_temperature"  # scalar
LOG_RIDGE = "log_ridge"  # scalar, of the ridge head
LOG_NAME_WEIGHT = "log_name_weight"  # scalar: how many examples the name of a class counts for
LOG_STEP_SIZE = "log_step_size."  # prefix; (steps,) for each group of adapted parameters
ALL_FACTORS = "lora"  # the group of all LoRA factors

START_TEMPERATURE = 10.0
START_RIDGE = 1.0
START_NAME_WEIGHT = 1.0


def initial_parameters(
    factor_shapes: Mapping[str, tuple[int, ...]],
    step_size_starts: Mapping[str, float],
    *,
    steps: int,
    ridge: bool = False,
    seed: int = 0,
) -> Parameters:
    """Return the parameters before any learning: LoRA that changes nothing, equal step sizes.

    Args:
        factor_shapes: shape of each LoRA factor by name.
        step_size_starts: start of the step sizes of each group (:func:`step_size_groups`).
        steps: inner steps, each with step sizes of its own.
        ridge: whether the head has a ridge.
        seed: of LoRA's random A.
    """
    return {
        **{LORA + name: value for name, value in zero_start(factor_shapes, seed).items()},
        LOG_TEMPERATURE: torch.tensor(math.log(START_TEMPERATURE)),
        **({LOG_RIDGE: torch.tensor(math.log(START_RIDGE))} if ridge else {}),
        LOG_NAME_WEIGHT: torch.tensor(math.log(START_NAME_WEIGHT)),
        **{
            LOG_STEP_SIZE + group: torch.full((steps,), math.log(start))
            for group, start in sorted(step_size_starts.items())
        },
    }


def lora_factors(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LoRA factors by the encoder's names."""
    return {name.removeprefix(LORA): value for name, value in parameters.items() if name.startswith(LORA)}


def is_scalar(name: str) -> bool:
    """Whether a parameter holds logarithms: of the temperature, the ridge, the name weight or step sizes."""
    return name in (LOG_TEMPERATURE, LOG_RIDGE, LOG_NAME_WEIGHT) or name.startswith(LOG_STEP_SIZE)


def head_scalars(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the head's positive scalars: temperature, name weight, and the ridge where there is one."""
    scalars = {"temperature": parameters[LOG_TEMPERATURE].exp(), "name_weight": parameters[LOG_NAME_WEIGHT].exp()}
    if LOG_RIDGE in parameters:
        scalars["ridge"] = parameters[LOG_RIDGE].exp()
    return scalars


def step_size_groups(factors: Iterable[str], per: StepSizesPer) -> list[str]:
    """Return the groups of LoRA factors that have step sizes in common: all, those of a layer, or each its own."""
    return sorted({_group(name, per) for name in factors})


def step_sizes(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the (steps,) step sizes of an adapted parameter: a LoRA factor by name, or :data:`OFFSET`."""
    groups = (OFFSET,) if name == OFFSET else (_group(name, "tensor"), _group(name, "layer"), ALL_FACTORS)
    return next(parameters[LOG_STEP_SIZE + group] for group in groups if LOG_STEP_SIZE + group in parameters).exp()


def _group(factor: str, per: StepSizesPer) -> str:
    if per == "tensor":
        return factor
    return layer_of(factor) if per == "layer" else ALL_FACTORS


def layer_of(factor: str) -> str:
    """Return the layer of a LoRA factor, up to the first number of its name.

    ``encoder.layer.3.attention.self.query.lora_B.weight`` → ``encoder.layer.3``.
    """
    layer = re.match(r".*?\.\d+(?=\.)", factor)
    return layer.group() if layer else ALL_FACTORS
