"""The settings of the outer loop."""

import math
from dataclasses import dataclass, field

from textmeta.errors import SettingsError
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.meta.self_supervision import SelfSupervisionSettings

__all__ = ["TrainingSettings"]


@dataclass(frozen=True)
class TrainingSettings:
    """The outer loop.

    Args:
        algorithm: name in :data:`~textmeta.meta.algorithms.ALGORITHMS`.
        steps: outer steps.
        tasks_per_step: episodes of an outer step, over all processes.
        learning_rate: of all that is no logarithm; for Reptile its ε. By default the algorithm's own.
        scalar_learning_rate: of the logarithms of temperature and step sizes (not for Reptile, which learns neither).
        warmup: steps over which the learning rate rises from 0, before a cosine takes it back to 0. Reptile's ε is
            constant.
        max_gradient_norm: longer gradients are shortened to this norm; null leaves them (as Reptile always does).
        validate_every: steps between validations; the parameters with the best validation accuracy are the result.
        validation_episodes: episodes of a validation, the same each time.
        checkpoint_every: steps between checkpoints.
        meta_gradient: second order, memory.
        self_supervision: what else teaches the task encoder, where the inner loop has one.
        unconditioned: share of the episodes that start from what no task embedding has a say in, so that this start
            stays good.
        seed: of the start and of all episodes.
    """

    algorithm: str = "fomaml"
    steps: int = 300
    tasks_per_step: int = 4
    learning_rate: float | None = None
    scalar_learning_rate: float = 0.01
    warmup: int = 20
    max_gradient_norm: float | None = 1.0
    validate_every: int = 50
    validation_episodes: int = 100
    checkpoint_every: int = 10
    meta_gradient: MetaGradientSettings = field(default_factory=MetaGradientSettings)
    self_supervision: SelfSupervisionSettings = field(default_factory=SelfSupervisionSettings)
    unconditioned: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.algorithm not in ALGORITHMS:
            raise SettingsError(f"algorithm must be one of {sorted(ALGORITHMS)}, given {self.algorithm!r}")
        for name in ("steps", "tasks_per_step", "validate_every", "validation_episodes", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"training {name} must be at least 1, given {getattr(self, name)}")
        for name in ("learning_rate", "scalar_learning_rate", "max_gradient_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(f"training {name} must be positive, given {value}")
        if not 0 <= self.unconditioned <= 1:
            raise SettingsError(f"training unconditioned must be a share from 0 to 1, given {self.unconditioned}")
        for name in ("warmup", "seed"):
            if getattr(self, name) < 0:
                raise SettingsError(f"training {name} must not be negative, given {getattr(self, name)}")
