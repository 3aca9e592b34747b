"""The task encoder: the support set of a task to a task embedding, a vector of length 1, and to class embeddings.

It sees frozen features only. Every class becomes a vector (from its prototype, the spread of its examples and, where
given, the feature of its name), the classes of a task are looked at together, and means over them make the embedding:
so the order of classes and examples does not matter, and any number of either will do. Before any learning the task
embedding is nearly the mean of the class embeddings, and these are a random projection of the prototypes.

Shapes: T tasks, n support examples (padded, label -1), C classes (padded to the most ways), d features of the encoder,
w width, e size of the embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize

from textmeta.errors import SettingsError
from textmeta.model.heads import class_mask, membership
from textmeta.model.initialisation import Parameters

__all__ = [
    "CENTRE",
    "N_STATISTICS",
    "TASK_ENCODER",
    "TaskEncoderSettings",
    "class_embeddings",
    "class_vectors",
    "task_embedding",
    "task_encoder_shapes",
    "task_encoder_start",
    "task_statistics",
]

Kind = Literal["statistics", "set_transformer", "graph"]

TASK_ENCODER = "task_encoder."  # prefix of its weights among the parameters
CENTRE = TASK_ENCODER + "centre"  # (d,)
N_STATISTICS = 5  # of task_statistics
ATTENTION_HEADS = 4
NEIGHBOUR_TEMPERATURE = 10.0  # of the cosines between prototypes that weigh a class's neighbours
RESIDUAL_START = 0.02  # of what is learned on top of the mean of the class embeddings, at the start
SMALLEST = 1e-6  # scatter
MAX_WIDTH = 4096


@dataclass(frozen=True)
class TaskEncoderSettings:
    """How a support set becomes a task embedding.

    Args:
        kind: how the classes of a task see each other: statistics (not at all: mean and spread over them), a
            set_transformer (attention among classes), or a graph (each class hears from those with similar prototypes).
        size: of the task embedding.
        width: of the layers in between; a multiple of 4 for the set transformer.
        label_names: whether it can see the names of classes, where they are given.
    """

    kind: Kind = "statistics"
    size: int = 128
    width: int = 256
    label_names: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.kind not in ("statistics", "set_transformer", "graph"):
            raise SettingsError(
                f"task_encoder kind must be 'statistics', 'set_transformer' or 'graph', given {self.kind!r}"
            )
        for name in ("size", "width"):
            if not 1 <= getattr(self, name) <= MAX_WIDTH:
                raise SettingsError(f"task_encoder {name} must be from 1 to {MAX_WIDTH}, given {getattr(self, name)}")
        if self.kind == "set_transformer" and self.width % ATTENTION_HEADS:
            raise SettingsError(f"task_encoder width must be a multiple of {ATTENTION_HEADS}, given {self.width}")


def task_encoder_shapes(settings: TaskEncoderSettings, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by name; maps are (out, in).

    Args:
        settings: of the task encoder.
        hidden_size: d, length of the features.
    """
    width, size = settings.width, settings.size
    shapes: dict[str, tuple[int, ...]] = {
        "centre": (hidden_size,),
        "class": (size, hidden_size),
        "prototype": (width, hidden_size),
        "spread": (width, hidden_size),
        "hidden": (width, 2 * width),
        "statistics": (width, N_STATISTICS),
        "task": (size, width),
    }
    if settings.label_names:
        shapes["name"] = (width, hidden_size)
    if settings.kind == "set_transformer":
        shapes |= dict.fromkeys(("query", "key", "value", "attended"), (width, width))
    if settings.kind == "graph":
        shapes["neighbours"] = (width, width)
    return {TASK_ENCODER + name: shape for name, shape in shapes.items()}


def task_encoder_start(settings: TaskEncoderSettings, hidden_size: int, generator: torch.Generator) -> Parameters:
    """Return the weights before any learning: those of a map are normal with variance 1 / in, but for the last."""
    weights = {}
    for name, shape in task_encoder_shapes(settings, hidden_size).items():
        if name == CENTRE:
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
    weights[TASK_ENCODER + "task"] *= RESIDUAL_START
    return weights


def class_embeddings(weights: Mapping[str, Tensor], features: Tensor, labels: Tensor, ways: Tensor) -> Tensor:
    """Return (T, C, e), an embedding of length 1 for each class; of classes that only pad, anything finite.

    Args:
        weights: with those of :func:`task_encoder_start` among them.
        features: (T, n, d) frozen features, of length 1.
        labels: (T, n) int64, -1 for padding.
        ways: (T,) int64.
    """
    return _projected(weights, class_moments(features, labels, int(ways.max()))[0])


def class_vectors(features: Tensor, labels: Tensor, ways: Tensor, names: Tensor | None = None) -> Tensor:
    """Return (T, C, d), the direction of each class's prototype, or of prototype plus name: what tasks are compared by.

    Nothing in it is learned: a learned map makes classes that training did not see harder to know again.

    Args:
        features: (T, n, d) frozen features, of length 1.
        labels: (T, n) int64, -1 for padding.
        ways: (T,) int64.
        names: (T, C, d) features of the class names, of length 1, zeros where not given.
    """
    prototypes = normalize(class_moments(features, labels, int(ways.max()))[0], dim=-1)
    return prototypes if names is None else normalize(prototypes + names, dim=-1)


def task_embedding(
    weights: Mapping[str, Tensor],
    settings: TaskEncoderSettings,
    features: Tensor,
    labels: Tensor,
    ways: Tensor,
    names: Tensor | None = None,
) -> Tensor:
    """Return the (T, e) task embeddings, each of length 1, differentiable in the weights.

    Sources: Zaheer et al. (2017), "Deep Sets" (statistics); Lee et al. (2019), "Set Transformer"; Garcia and Bruna
    (2018), "Few-Shot Learning with Graph Neural Networks" (edges from the similarity of nodes, here of prototypes).

    Args:
        weights: with those of :func:`task_encoder_start` among them.
        settings: of the task encoder.
        features: (T, n, d) frozen features of the support sets, of length 1.
        labels: (T, n) int64, -1 for padding.
        ways: (T,) int64.
        names: (T, C, d) features of the class names, zeros for a class whose name is not given; None for no names. Only
            for a task encoder that can see them.
    """
    weight = {name.removeprefix(TASK_ENCODER): w for name, w in weights.items() if name.startswith(TASK_ENCODER)}
    mask = class_mask(ways).to(features.dtype)[..., None]
    prototypes, spread = class_moments(features, labels, int(ways.max()))
    scale = math.sqrt(features.shape[-1])  # entries of about 1
    classes = scale * ((prototypes - weight["centre"]) @ weight["prototype"].T + spread @ weight["spread"].T)
    if names is not None:
        classes = classes + scale * names @ weight["name"].T
    classes = gelu(classes)
    if settings.kind == "set_transformer":
        classes = classes + _attend(classes, weight, mask)
    if settings.kind == "graph":
        classes = classes + gelu(_neighbours(classes, prototypes, mask) @ weight["neighbours"].T)
    pooled = torch.cat([_mean(classes, mask), _spread(classes, mask)], -1)
    statistics = task_statistics(features, labels, ways)
    hidden = gelu(_scaled(pooled) @ weight["hidden"].T + statistics @ weight["statistics"].T)
    means = _mean(_projected(weights, prototypes), mask)
    return normalize(normalize(means, dim=-1) + hidden @ weight["task"].T, dim=-1)


def task_statistics(features: Tensor, labels: Tensor, ways: Tensor) -> Tensor:
    """Return (T, 5) numbers of about 1 that say how large and how hard a task is.

    Log ways, mean over classes of log shots, scatter within classes, scatter between prototypes, and the log of the
    second over the first (0 where no class has two examples).

    Args:
        features: (T, n, d) frozen features, of length 1.
        labels: (T, n), -1 for padding.
        ways: (T,).
    """
    count = int(ways.max())
    mask = class_mask(ways).to(features.dtype)
    shots = membership(labels, count).sum(1).to(features.dtype)
    prototypes, spread = class_moments(features, labels, count)
    several = (shots > 1).to(features.dtype)
    within = (spread.square().sum(-1) * several).sum(1) / several.sum(1).clamp(min=1)
    centre = _mean(prototypes, mask[..., None])
    between = ((prototypes - centre[:, None]).square().sum(-1) * mask).sum(1) / (ways - 1).clamp(min=1)
    known = (within > SMALLEST) & (between > SMALLEST)  # not 0: of equal texts rounding leaves a little
    ratio = torch.where(known, (between / within.clamp(min=SMALLEST)).clamp(min=SMALLEST).log(), 0.0)
    log_shots = (shots.clamp(min=1).log() * mask).sum(1) / ways
    return torch.stack([ways.to(features.dtype).log(), log_shots, within, between, ratio], 1)


def class_moments(features: Tensor, labels: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Return (T, C, d) mean and standard deviation of each class's features; the latter is 0 for a single example."""
    member = membership(labels, ways).to(features.dtype)
    shots = member.sum(1)[..., None]
    means = torch.einsum("tnd,tnc->tcd", features, member) / shots.clamp(min=1)
    # around the mean, not as a difference of squares, which rounding would make negative
    deviations = (features - torch.einsum("tcd,tnc->tnd", means, member)).square()
    squares = torch.einsum("tnd,tnc->tcd", deviations, member)
    return means, (squares / (shots - 1).clamp(min=1)).sqrt()


def _projected(weights: Mapping[str, Tensor], prototypes: Tensor) -> Tensor:
    """Return (T, C, e), the direction of each class's prototype (T, C, d) in the space of task embeddings."""
    return normalize((prototypes - weights[CENTRE]) @ weights[TASK_ENCODER + "class"].T, dim=-1)


def _attend(classes: Tensor, weight: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Return (T, C, w): multi-head attention of every class to all classes of its task."""

    def heads(name: str) -> Tensor:
        projected = _scaled(classes) @ weight[name].T
        return projected.view(*projected.shape[:2], ATTENTION_HEADS, -1).transpose(1, 2)

    query, key, value = heads("query"), heads("key"), heads("value")
    scores = query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1])
    scores = scores.masked_fill(~mask[:, None, :, 0, None].transpose(-1, -2).bool(), -torch.inf)
    mixed: Tensor = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return mixed @ weight["attended"].T


def _neighbours(classes: Tensor, prototypes: Tensor, mask: Tensor) -> Tensor:
    """Return (T, C, w): for every class the mean of the others, weighted by how similar their prototypes are."""
    directions = normalize(prototypes, dim=-1)
    cosines = NEIGHBOUR_TEMPERATURE * directions @ directions.transpose(1, 2)
    itself = torch.eye(classes.shape[1], dtype=torch.bool, device=classes.device)
    left_out = itself | ~mask[..., 0].bool()[:, None]
    weights = torch.where(left_out, torch.full_like(cosines, -1e9), cosines).softmax(-1)
    return (weights * ~left_out) @ _scaled(classes)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over classes: (T, C, w) and (T, C, 1) → (T, w)."""
    return (values * mask).sum(1) / mask.sum(1)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Return the standard deviation over classes: (T, C, w) and (T, C, 1) → (T, w)."""
    return ((values - _mean(values, mask)[:, None]).square() * mask).sum(1).div(mask.sum(1)).add(1e-6).sqrt()


def _scaled(values: Tensor) -> Tensor:
    """Return values with mean 0 and variance 1 over the last dimension."""
    return layer_norm(values, values.shape[-1:])
