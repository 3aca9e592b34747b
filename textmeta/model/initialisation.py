"""The initialisation: everything that meta-learning learns, as one flat dictionary of named tensors.

Flat, so that a meta-gradient, an optimiser's moments and a checkpoint are dictionaries of the same names.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from textmeta.model.lora import zero_start

__all__ = [
    "LOG_STEP_SIZE",
    "LOG_TEMPERATURE",
    "LORA",
    "OFFSET",
    "Parameters",
    "initial_parameters",
    "lora_factors",
    "step_sizes",
    "temperature",
]

Parameters = dict[str, Tensor]

LORA = "lora."  # prefix of the LoRA factors' names
OFFSET = "offset"  # the head's offset: adapted, but never learned, since it starts from 0 in every task
LOG_TEMPERATURE = "log_temperature"  # scalar
LOG_STEP_SIZE = "log_step_size."  # prefix; (steps,) for each group of adapted parameters


def initial_parameters(
    factor_shapes: Mapping[str, tuple[int, ...]],
    *,
    steps: int,
    lora_step_size: float,
    offset_step_size: float,
    start_temperature: float = 10.0,
    seed: int = 0,
) -> Parameters:
    """Return the parameters before any learning: LoRA that changes nothing, equal step sizes.

    Args:
        factor_shapes: shape of each LoRA factor by name.
        steps: inner steps, each with a step size of its own.
        lora_step_size: start of the LoRA factors' step sizes.
        offset_step_size: start of the head offset's step sizes.
        start_temperature: start of the factor on the cosine.
        seed: of LoRA's random A.
    """
    return {
        **{LORA + name: value for name, value in zero_start(factor_shapes, seed).items()},
        LOG_TEMPERATURE: torch.tensor(math.log(start_temperature)),
        LOG_STEP_SIZE + "lora": torch.full((steps,), math.log(lora_step_size)),
        LOG_STEP_SIZE + OFFSET: torch.full((steps,), math.log(offset_step_size)),
    }


def lora_factors(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LoRA factors by the encoder's names."""
    return {name.removeprefix(LORA): value for name, value in parameters.items() if name.startswith(LORA)}


def temperature(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the factor on the cosine, a positive scalar."""
    return parameters[LOG_TEMPERATURE].exp()


def step_sizes(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the (steps,) step sizes of an adapted parameter: a LoRA factor by name, or :data:`OFFSET`."""
    return parameters[LOG_STEP_SIZE + (OFFSET if name == OFFSET else "lora")].exp()
