"""The initialisation: everything that meta-learning learns, as one flat dictionary of named tensors.

Flat, so that a meta-gradient, an optimiser's moments and a checkpoint are dictionaries of the same names.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from textmeta.model.lora import zero_start

__all__ = [
    "EVIDENCE_SLOPES",
    "LOG_ADAPTED_FACTOR",
    "LOG_NAME_WEIGHT",
    "LOG_RIDGE",
    "LOG_RIDGE_WEIGHT",
    "LOG_STEP_SIZE",
    "LOG_TEMPERATURE",
    "LORA",
    "OFFSET",
    "SCOPE",
    "STRENGTH_PRIOR",
    "TEMPERATURE_SLOPES",
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
LOG_RIDGE = "log_ridge"  # scalar, of heads with a ridge regression
LOG_RIDGE_WEIGHT = "log_ridge_weight"  # scalar, of the readout: how much its ridge regression weighs
LOG_NAME_WEIGHT = "log_name_weight"  # scalar: how many examples the name of a class counts for
LOG_STEP_SIZE = "log_step_size."  # prefix; (steps,) for each group of adapted parameters
ALL_FACTORS = "lora"  # the group of all LoRA factors

TEMPERATURE_SLOPES = "temperature_slopes"  # (2,): how the log temperature grows with log shots and log ways
EVIDENCE_SLOPES = "evidence_slopes"  # (2,): how it grows with how well the support set predicts itself
LOG_ADAPTED_FACTOR = "log_adapted_factor"  # scalar: on the temperature after inner steps, where it was fitted
STRENGTH_PRIOR = "strength_prior"  # (strengths,): log weights of LoRA's strengths, before a task is seen
SCOPE = "scope"  # (features,): the rule for what is out of scope, where one was learned

START_TEMPERATURE = 10.0
START_NAME_WEIGHT = 1.0
# name of a head's scalar → its parameter, the logarithm
HEAD_SCALARS = {
    "temperature": LOG_TEMPERATURE,
    "name_weight": LOG_NAME_WEIGHT,
    "ridge": LOG_RIDGE,
    "ridge_weight": LOG_RIDGE_WEIGHT,
}


def initial_parameters(
    factor_shapes: Mapping[str, tuple[int, ...]],
    step_size_starts: Mapping[str, Sequence[float]],
    *,
    head_starts: Mapping[str, float] | None = None,
    strengths: int = 1,
    seed: int = 0,
) -> Parameters:
    """Return the parameters before any learning: LoRA that changes nothing.

    Args:
        factor_shapes: shape of each LoRA factor by name.
        step_size_starts: start of the step sizes of each group (:func:`step_size_groups`), one for each inner step.
        head_starts: start of the scalars that not every head has.
        strengths: number of LoRA's strengths that a task may choose from.
        seed: of LoRA's random A.
    """
    scalars = {"temperature": START_TEMPERATURE, "name_weight": START_NAME_WEIGHT, **(head_starts or {})}
    return {
        **{LORA + name: value for name, value in zero_start(factor_shapes, seed).items()},
        **{HEAD_SCALARS[name]: torch.tensor(math.log(start)) for name, start in scalars.items()},
        TEMPERATURE_SLOPES: torch.zeros(2),
        EVIDENCE_SLOPES: torch.zeros(2),
        STRENGTH_PRIOR: torch.zeros(strengths),
        **{
            LOG_STEP_SIZE + group: torch.tensor([math.log(start) for start in starts])
            for group, starts in sorted(step_size_starts.items())
        },
    }


def lora_factors(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LoRA factors by the encoder's names."""
    return {name.removeprefix(LORA): value for name, value in parameters.items() if name.startswith(LORA)}


def is_scalar(name: str) -> bool:
    """Whether a parameter holds logarithms: of the head's scalars, the factor on its temperature, or step sizes."""
    return name in (*HEAD_SCALARS.values(), LOG_ADAPTED_FACTOR) or name.startswith(LOG_STEP_SIZE)


def head_scalars(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the head's positive scalars: temperature, name weight, and what else it has."""
    return {name: parameters[log].exp() for name, log in HEAD_SCALARS.items() if log in parameters}


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
