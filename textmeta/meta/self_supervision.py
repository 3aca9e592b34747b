"""What teaches the task encoder beside the query loss: two disjoint draws of the same classes are one task.

An episode's support and query set are two such draws. No label that training does not have anyway is used.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from textmeta.data.episodes import Episode, EpisodeSampler
from textmeta.errors import SettingsError
from textmeta.meta.inner_loop import InnerLoopSettings, without_conditioning
from textmeta.meta.tasks import frozen_features, frozen_names
from textmeta.model.conditioning import KEYS, routing
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import Parameters
from textmeta.model.task_encoder import class_embeddings, task_embedding

__all__ = [
    "SelfSupervisionSettings",
    "balance_loss",
    "by_condition",
    "contrastive_loss",
    "self_supervised_gradient",
    "train_task_encoder",
]


UNCONDITIONED = 1  # a stream of random numbers of its own, beside those of the episodes


@dataclass(frozen=True)
class SelfSupervisionSettings:
    """Losses on task embeddings, of further episodes in each outer step; these go through no LoRA, so they are cheap.

    Args:
        episodes: further episodes of an outer step; 0 for none.
        contrastive: weight of the contrastive losses: a draw of a task has to find the other one among those of other
            tasks, and a draw of a class among those of other classes.
        contrast: factor on the cosines in these (one over InfoNCE's temperature).
        balance: weight of the loss that keeps all banks in use.
    """

    episodes: int = 32
    contrastive: float = 0.1
    contrast: float = 10.0
    balance: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.episodes == 1 or self.episodes < 0:
            raise SettingsError(f"self_supervision episodes must be 0, or at least 2 to tell apart: {self.episodes}")
        for name in ("contrastive", "balance"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SettingsError(f"self_supervision {name} must not be negative, given {getattr(self, name)}")
        if not 0 < self.contrast < float("inf"):
            raise SettingsError(f"self_supervision contrast must be positive, given {self.contrast}")


def contrastive_loss(one: Tensor, two: Tensor, contrast: float, same: Tensor | None = None) -> Tensor:
    """Return the mean cross entropy of finding row i of one set among the rows of the other, both ways.

    Source: van den Oord et al. (2018), "Representation Learning with Contrastive Predictive Coding", eq. 4 (InfoNCE).

    Args:
        one: (N, e), of length 1.
        two: (N, e), row i belongs to row i of ``one``.
        contrast: factor on the cosines.
        same: (N, N) bool, pairs off the diagonal that belong together too, and count neither for nor against.
    """
    scores = contrast * one @ two.T
    if same is not None:
        itself = torch.eye(len(one), dtype=torch.bool, device=one.device)
        scores = scores.masked_fill(same & ~itself, -torch.inf)
    target = torch.arange(len(one), device=one.device)
    return (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2


def balance_loss(weights: Tensor) -> Tensor:
    """Return log K minus the entropy of the mean routing, averaged over groups: 0 where all banks are used equally.

    Args:
        weights: (T, groups, K) routing of T tasks.
    """
    mean = weights.mean(0)
    return (mean * (mean * mean.shape[-1]).clamp(min=1e-12).log()).sum(-1).mean()


@torch.enable_grad()
def self_supervised_gradient(
    encoder: Encoder,
    parameters: Parameters,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    settings: SelfSupervisionSettings,
) -> Parameters:
    """Return the gradient of the weighted losses in every parameter that they depend on.

    Args:
        encoder: makes frozen features.
        parameters: the initialisation.
        episodes: at least two.
        inner: whose conditioning says which task encoder.
        settings: the weights.
    """
    assert inner.conditioning is not None, "no task encoder to teach"
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    task_encoder = inner.conditioning.task_encoder
    draws = []
    for part in ("support", "query"):
        tasks = frozen_features(encoder, episodes, part)
        names = None
        if task_encoder.label_names and part == "support":  # a draw with names has to find one without, and every other
            names = frozen_names(encoder, episodes)  # draw here has none: they are optional
            names[1::2] = 0
        embedding = task_embedding(leaves, task_encoder, *tasks, names)
        draws.append((embedding, class_embeddings(leaves, *tasks)))
    (one, one_classes), (two, two_classes) = draws
    tasks_same = _same([(e.corpus, frozenset(e.class_names)) for e in episodes], encoder.device)
    classes_same = _same([(e.corpus, name) for e in episodes for name in e.class_names], encoder.device)
    rows = torch.tensor([i for i, e in enumerate(episodes) for _ in e.class_names], device=encoder.device)
    columns = torch.tensor([c for e in episodes for c in range(e.ways)], device=encoder.device)
    loss = settings.contrastive * (
        contrastive_loss(one, two, settings.contrast, tasks_same)
        + contrastive_loss(one_classes[rows, columns], two_classes[rows, columns], settings.contrast, classes_same)
    )
    if KEYS in leaves:
        loss = loss + settings.balance * balance_loss(routing(leaves, one))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: part for name, part in zip(leaves, found, strict=True) if part is not None}


def _same(things: Sequence[Hashable], device: torch.device) -> Tensor:
    """Return (N, N) bool, which of N things are equal."""
    number = {thing: index for index, thing in enumerate(dict.fromkeys(things))}
    numbers = torch.tensor([number[thing] for thing in things], device=device)
    return numbers[:, None] == numbers[None]


def by_condition(
    inner: InnerLoopSettings, unconditioned: float, seed: int, indices: Sequence[int]
) -> Iterator[tuple[InnerLoopSettings, list[int]]]:
    """Yield episodes that are conditioned on their embedding, and those that are not, with the inner loop of each.

    Args:
        inner: the inner loop.
        unconditioned: share of the episodes that are not, so that the start without a say of the embedding stays good.
        seed: of the draw.
        indices: numbers of the episodes; each is drawn by its number alone.
    """
    dropped: list[int] = []
    if inner.conditioning is not None and inner.conditioning.decides:
        draws = [np.random.default_rng((seed, UNCONDITIONED, index)).random() for index in indices]
        dropped = [index for index, draw in zip(indices, draws, strict=True) if draw < unconditioned]
    kept = [index for index in indices if index not in dropped]
    for loop, part in ((inner, kept), (without_conditioning(inner), dropped)):
        if part:
            yield loop, part


def train_task_encoder(
    encoder: Encoder,
    parameters: Parameters,
    episodes: EpisodeSampler,
    inner: InnerLoopSettings,
    settings: SelfSupervisionSettings,
    *,
    steps: int,
    learning_rate: float = 1e-3,
) -> Parameters:
    """Return the parameters after steps of Adam on these losses alone: a task encoder that no meta-learning needs.

    Args:
        encoder: makes frozen features.
        parameters: to start from.
        episodes: step s takes the next ``settings.episodes`` of them.
        inner: whose conditioning says which task encoder.
        settings: the weights, and how many episodes a step.
        steps: of Adam; its step size falls evenly to 0.
        learning_rate: of the first step.

    Raises:
        SettingsError: if there are fewer than two episodes a step.
    """
    if settings.episodes < 2:
        raise SettingsError(f"a task encoder needs at least 2 episodes a step to learn, given {settings.episodes}")
    learned = {name: value.to(encoder.device, copy=True).requires_grad_() for name, value in parameters.items()}
    optimiser = torch.optim.Adam(learned.values(), lr=learning_rate)
    for step in tqdm(range(steps), desc="task encoder", unit="step"):
        batch = episodes.take(settings.episodes, step * settings.episodes)
        for name, gradient in self_supervised_gradient(encoder, learned, batch, inner, settings).items():
            learned[name].grad = gradient
        optimiser.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimiser.step()
    return {name: value.detach() for name, value in learned.items()}
