"""What meta-training learns by gradient: the start of every task, as one object of named tensors.

Numbers that must be positive are kept as logarithms. Shapes: V views, d dimensions, J inner steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from textmeta.data.labels import one_of, whole_number
from textmeta.encoder.lora import layer_of, zero_start
from textmeta.errors import AdapterError, SettingsError
from textmeta.heads import HEADS

Adapt = Literal["none", "pooling", "lora", "pooling+lora", "offset"]
MAX_STEPS = 50
LORA = "lora."  # before the names of LoRA's factors
POSITIVE = {  # what positive numbers, kept as their logarithms, start from
    **{"loss_log_scale": 10.0, "log_penalty": 1.0, "log_centre_strength": 1.0, "log_name_centre_strength": 1.0},
    **{"log_evidence_strength": 4.0, "log_evidence_half": 20.0, "log_evidence_scale": 8.0},
    **{"log_name_scale": 15.0, "log_zero_shot_scale": 15.0, "log_unlabelled_share": 1.0},
}


@dataclass(frozen=True)
class LearnerSettings:
    """How a task is learned.

    Args:
        layers: of the encoder, whose token states are the views; ascending, 0 is what enters the first layer. By
            default the upper half and what enters it.
        adapt: what the inner steps change: where each view looks in a text (pooling), LoRA, both, or nothing; "offset"
            is what ANIL adapts: an offset to the head's weights.
        steps: inner steps.
        head: what makes logits of views, one of :data:`~textmeta.heads.HEADS`.
        entry_step_sizes: a learned step size for each entry of a pooling query (Meta-SGD), not one a query.
    """

    layers: tuple[int, ...] | None = None
    adapt: Adapt = "pooling"
    steps: int = 6
    head: str = "ridge"
    entry_step_sizes: bool = False

    def __post_init__(self) -> None:
        one_of("adapt", self.adapt, get_args(Adapt))
        one_of("head", self.head, sorted(HEADS))
        layers = () if self.layers is None else self.layers
        if not isinstance(layers, Sequence) or not all(type(layer) is int for layer in layers):
            raise SettingsError(f"layers must be numbers, such as (2, 4, 6), given {layers!r:.60}")
        whole_number("steps", self.steps, 0, MAX_STEPS)

    def reduced(self, adapt: Adapt | None, steps: int | None) -> "LearnerSettings":
        """Return the settings with a part of what these adapt, and so many of their first steps; None leaves them.

        SettingsError if that is not what was learned with these.
        """
        learned = {"none", self.adapt, *self.adapt.split("+")}
        one_of("adapt, of what this adapter has learned,", adapt, [None, *sorted(learned)])
        steps = self.steps if steps is None else whole_number("steps", steps, 0, self.steps)
        return replace(self, adapt=adapt or self.adapt, steps=steps)


@dataclass(frozen=True)
class Initialisation:
    """Everything that is learned by gradient."""

    lora: dict[str, Tensor]  # LoRA factors by name, shared by all tasks
    queries: Tensor  # (V, d) q₀, the pooling queries that tasks start from
    log_step_sizes: Tensor  # (J, V) or (J, V, d) log α of the pooling queries
    lora_log_step_sizes: Tensor  # (J, layers with LoRA) log α of LoRA's factors
    offset_log_step_sizes: Tensor  # (J,) log α of the head's offset
    pull: Tensor  # () logit of δ, the share by which each step goes back towards the start
    step_gate: Tensor  # (2,) γ₀, γ₁ of γ(k) = sigmoid(γ₀ + γ₁ log(1 + k))
    loss_view_weights: Tensor  # (V,) logits of the views' weights in the neighbourhood loss
    loss_log_scale: Tensor  # () of the cosines in it
    centre: Tensor  # (V, d) μ, the learned mean of texts
    log_centre_strength: Tensor  # () log n₀
    log_penalty: Tensor  # () log λ
    view_prior: Tensor  # (V,) a
    log_evidence_strength: Tensor  # () log β
    log_evidence_half: Tensor  # () log n_s
    log_evidence_scale: Tensor  # () of left-out scores
    temperature: Tensor  # (5,) t₀ … t₄
    name_view_weights: Tensor  # (V,) logits of the views' weights in names
    name_centre: Tensor  # (V, d) the learned mean of names
    log_name_centre_strength: Tensor  # ()
    log_name_scale: Tensor  # () log t_n
    log_zero_shot_scale: Tensor  # () the same where names are alone
    name_gate: Tensor  # (3,) b₀ … b₂
    log_unlabelled_share: Tensor  # () log ν
    unlabelled_weight: Tensor  # (3,) r₀ … r₂

    @classmethod
    def start(
        cls, factor_shapes: Mapping[str, tuple[int, ...]], hidden_size: int, settings: LearnerSettings, seed: int
    ) -> "Initialisation":
        """Return what training begins with: LoRA's usual start, by its seed, mean pooling, and numbers about right.

        The settings must say which layers are the views.
        """
        views, steps = len(settings.layers or ()), settings.steps
        last = torch.full((views,), -1.0)  # the last layer is the usual one: it starts with the most weight
        last[-1] = 0.0
        entries = (hidden_size,) if settings.entry_step_sizes else ()
        layers = len({layer_of(name) for name in factor_shapes})
        return cls(
            lora=zero_start(factor_shapes, seed),
            queries=torch.zeros(views, hidden_size),
            log_step_sizes=torch.full((steps, views, *entries), math.log(0.3)),
            lora_log_step_sizes=torch.full((steps, layers), math.log(0.005)),
            offset_log_step_sizes=torch.full((steps,), math.log(0.05)),
            pull=torch.tensor(-3.0),
            step_gate=torch.zeros(2),
            loss_view_weights=last.clone(),
            centre=torch.zeros(views, hidden_size),
            view_prior=last.clone(),
            temperature=torch.tensor([2.6, -0.2, 0.3, 0.0, 0.0]),
            name_view_weights=last.clone(),
            name_centre=torch.zeros(views, hidden_size),
            name_gate=torch.tensor([-1.4, 0.19, -0.38]),
            unlabelled_weight=torch.tensor([math.log(0.3), 0.0, 0.0]),
            **{name: torch.full((), math.log(value)) for name, value in POSITIVE.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; LoRA's factors by their names after ``lora.``."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "lora"}
        return {**{LORA + name: value for name, value in self.lora.items()}, **plain}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Initialisation":
        """Return one like this, made of other tensors; AdapterError if one is missing, unknown, or of another shape."""
        own = self.tensors()
        for name in sorted(own.keys() | tensors.keys()):
            if name not in own or name not in tensors:
                raise AdapterError(f"the tensor {name!r} is {'not known' if name not in own else 'missing'}")
            if own[name].shape != tensors[name].shape:
                raise AdapterError(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}")
        plain = {name: value for name, value in tensors.items() if not name.startswith(LORA)}
        return replace(self, lora={name: tensors[LORA + name] for name in self.lora}, **plain)
