"""The outer loop: episodes of many corpora, the gradient of what their queries lose after the inner steps, Adam."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from textmeta.data.episodes import Episode
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import DivergedError, SettingsError, TrainingInterrupted
from textmeta.meta.checkpoint import TrainingState, restore_state, save_state
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.interruption import stop_requests
from textmeta.meta.learner import TaskLearner
from textmeta.meta.record import Record
from textmeta.model.pretrained import tensors_digest

__all__ = ["CORE_ALGORITHMS", "CoreAlgorithm", "MetaTrainer", "OuterSettings", "query_losses"]

CHECKPOINT, RECORD = "checkpoint.safetensors", "record.jsonl"
LORA, CENTRES = "lora.", ("centre", "name_centre")  # groups with learning rates of their own; all else are numbers


class Episodes(Protocol):
    """Episodes by number, each a pure function of it."""

    def __getitem__(self, index: int) -> Episode:
        """Return episode ``index``."""


@dataclass(frozen=True)
class OuterSettings:
    """How an initialisation is learned.

    Args:
        algorithm: a row of :data:`CORE_ALGORITHMS`.
        episodes: how many are seen in all.
        tasks_per_step: whose gradients are averaged in one step of Adam.
        lora_rate: learning rate of LoRA's factors.
        number_rate: of numbers and pooling queries.
        centre_rate: of the learned centres of texts and names.
        warmup: steps over which the rates rise; then they fall to 0, linearly.
        max_gradient_norm: longer gradients are shortened to it.
        fixed: names of tensors, or beginnings of them, that are not learned.
        checkpoint_every: steps.
        seed: of LoRA's start; episodes have a seed of their own.
    """

    algorithm: str = "maml"
    episodes: int = 6000
    tasks_per_step: int = 2
    lora_rate: float = 5e-4
    number_rate: float = 0.02
    centre_rate: float = 1e-3
    warmup: int = 20
    max_gradient_norm: float = 1.0
    fixed: tuple[str, ...] = ()
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.algorithm not in CORE_ALGORITHMS:
            raise SettingsError(f"algorithm must be one of {sorted(CORE_ALGORITHMS)}, given {self.algorithm!r}")
        for name in ("episodes", "tasks_per_step", "warmup", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, given {getattr(self, name)}")

    @property
    def steps(self) -> int:
        """Number of outer steps."""
        return -(-self.episodes // self.tasks_per_step)


def query_losses(learner: TaskLearner, episodes: Sequence[Episode], second_order: bool) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy (T,) and the accuracy (T,) of the episodes' queries, after the inner steps."""
    learned, queries, states = learner.learn_episodes(episodes, second_order)
    logits = learner.logits(learned, queries, states)
    flat = torch.cat([torch.as_tensor(e.query_labels) for e in episodes]).to(logits.device)
    labels = queries.pad(flat + 1) - 1  # -1 for padding, and for queries of no class
    counts = labels >= 0
    losses = cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view_as(labels)
    number = counts.sum(1).clamp(min=1)
    loss = torch.where(counts, losses, 0.0).sum(1) / number
    return loss, ((logits.argmax(-1) == labels) & counts).sum(1) / number


Gradient = Callable[[TaskLearner, Sequence[Episode], Mapping[str, Tensor]], tuple[dict[str, Tensor], Tensor, Tensor]]


def maml(
    learner: TaskLearner, episodes: Sequence[Episode], leaves: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Exact gradient of the query loss after the inner steps, through their gradients.

    Source: Finn et al. (2017), "Model-Agnostic Meta-Learning", algorithm 1.
    """
    return _gradient(learner, episodes, leaves, second_order=True)


def fomaml(
    learner: TaskLearner, episodes: Sequence[Episode], leaves: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradient of the query loss after the inner steps, with their gradients taken as constants.

    Source: Finn et al. (2017), section 5.2, first-order approximation.
    """
    return _gradient(learner, episodes, leaves, second_order=False)


def reptile(
    learner: TaskLearner, episodes: Sequence[Episode], leaves: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """First-order gradient, but for what the steps adapt: that moves to where steps on support and queries end.

    The pseudo-gradient of the pooling queries is q₀ - mean q_J; of LoRA's factors, where adapted, likewise.

    Source: Nichol et al. (2018), "On First-Order Meta-Learning Algorithms".
    """
    gradients, loss, accuracy = _gradient(learner, episodes, leaves, second_order=False)
    inside = [e for e in episodes if len(e.support_texts)]
    if not inside:
        return gradients, loss, accuracy
    both = [
        replace(
            e,
            support_texts=e.support_texts
            + tuple(t for t, c in zip(e.query_texts, e.query_labels, strict=True) if c >= 0),
            support_labels=np.concatenate([e.support_labels, e.query_labels[e.query_labels >= 0]]),
            label_names=None,
            unlabelled_texts=(),
        )
        for e in inside
    ]
    with torch.no_grad():
        learned, _, _ = learner.learn_episodes([replace(e, query_texts=()) for e in both])
        if learned.queries.ndim == 3 and "queries" in leaves:
            gradients["queries"] = (learner.initialisation.queries - learned.queries).mean(0)
        for name, value in learned.factors.items():
            if value.ndim == 3 and LORA + name in leaves:
                gradients[LORA + name] = (learner.initialisation.lora[name] - value).mean(0)
    return gradients, loss, accuracy


def _gradient(
    learner: TaskLearner, episodes: Sequence[Episode], leaves: Mapping[str, Tensor], second_order: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    loss, accuracy = query_losses(learner, episodes, second_order)
    found = torch.autograd.grad(loss.mean(), list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if part is None else part
        for (name, leaf), part in zip(leaves.items(), found, strict=True)
    }
    return gradients, loss.detach(), accuracy


@dataclass(frozen=True)
class CoreAlgorithm:
    """A row of :data:`CORE_ALGORITHMS`.

    Args:
        gradient: (learner, episodes, tensors that are learned) → their gradients, loss (T,) and accuracy (T,).
        settings: from the learner's settings as given, those that the algorithm learns for.
    """

    gradient: Gradient
    settings: Callable[[LearnerSettings], LearnerSettings]


CORE_ALGORITHMS: dict[str, CoreAlgorithm] = {
    "maml": CoreAlgorithm(maml, lambda s: s),
    "fomaml": CoreAlgorithm(fomaml, lambda s: s),
    "reptile": CoreAlgorithm(reptile, lambda s: s),
    "meta_sgd": CoreAlgorithm(maml, lambda s: replace(s, entry_step_sizes=True)),
    "protonet": CoreAlgorithm(fomaml, lambda s: replace(s, adapt="none", head="prototype")),
}


class MetaTrainer:
    """Learns an initialisation over episodes.

    Args:
        reader: gives the token states of their texts.
        learner: how tasks are learned, before the algorithm has its say.
        settings: of the outer loop.
    """

    def __init__(self, reader: TokenStateReader, learner: LearnerSettings, settings: OuterSettings) -> None:
        self.reader = reader
        self.algorithm = CORE_ALGORITHMS[settings.algorithm]
        self.learner = self.algorithm.settings(learner)
        self.settings = settings
        self.shape = Initialisation.start(
            reader.encoder.factor_shapes, reader.encoder.hidden_size, self.learner, settings.seed
        )
        unknown = [name for name in settings.fixed if not any(own.startswith(name) for own in self.shape.tensors())]
        if unknown:
            raise SettingsError(f"fixed names {unknown[0]!r}, but there are {', '.join(self.shape.tensors())}")

    def train(
        self,
        episodes: Episodes,
        output: Path,
        told: Mapping[str, Any] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> Initialisation:
        """Learn an initialisation; step s uses episodes s·T to s·T + T - 1.

        ``output`` gets a checkpoint and ``record.jsonl``; where it has a checkpoint of a run with the same settings,
        the run goes on from there.

        Args:
            episodes: to learn from.
            output: folder of the run.
            told: what else a run is known by, such as its corpora.
            start: tensors to start from instead of the usual ones.

        Raises:
            TrainingInterrupted: on SIGINT or SIGTERM, after writing a checkpoint.
            DivergedError: if loss or gradient are not finite.
            SettingsError: if ``output`` holds a run with other settings.
        """
        settings, shape = self.settings, self.shape
        tensors = {**shape.tensors(), **(start or {})}
        parameters = {n: value.detach().clone().to(self.reader.encoder.device) for n, value in tensors.items()}
        learned = [name for name in parameters if not name.startswith(settings.fixed or ("\0",))]
        for name in learned:
            parameters[name].requires_grad_()
        optimiser = torch.optim.Adam(self._groups(parameters, learned))
        state = TrainingState(parameters, optimiser)
        fingerprint = {"learner": _plain(self.learner), "outer": _plain(settings), **(told or {})}
        if start:
            fingerprint["start"] = tensors_digest(start)
        output.mkdir(parents=True, exist_ok=True)
        if (output / CHECKPOINT).exists():
            restore_state(state, output / CHECKPOINT, fingerprint)
        with (
            stop_requests() as stop_requested,
            Record(output / RECORD, state.step, enabled=True) as record,
            tqdm(total=settings.steps, initial=state.step, desc=settings.algorithm, unit="step") as progress,
        ):
            while state.step < settings.steps:
                row = self._step(shape, state, learned, episodes)
                record.write(row)
                progress.set_postfix({"loss": row["loss"], "acc": row["accuracy"]}, refresh=False)
                progress.update()
                stop = stop_requested() and state.step < settings.steps
                if stop or state.step % settings.checkpoint_every == 0 or state.step == settings.steps:
                    save_state(state, output / CHECKPOINT, fingerprint)
                if stop:
                    raise TrainingInterrupted(
                        f"stopped after step {state.step} of {settings.steps}; the same command goes on from "
                        f"{output / CHECKPOINT}"
                    )
        return shape.with_tensors({name: value.detach() for name, value in state.parameters.items()})

    def _groups(self, parameters: Mapping[str, Tensor], learned: Sequence[str]) -> list[dict[str, Any]]:
        settings = self.settings
        lora = [name for name in learned if name.startswith(LORA)]
        centres = [name for name in learned if name in CENTRES]
        numbers = [name for name in learned if name not in lora and name not in centres]
        rates = ((lora, settings.lora_rate), (numbers, settings.number_rate), (centres, settings.centre_rate))
        return [
            {"params": [parameters[name] for name in part], "lr": rate, "base": rate} for part, rate in rates if part
        ]

    def _step(
        self, shape: Initialisation, state: TrainingState, learned: Sequence[str], episodes: Episodes
    ) -> dict[str, float]:
        settings = self.settings
        first = state.step * settings.tasks_per_step
        own = [episodes[number] for number in range(first, min(first + settings.tasks_per_step, settings.episodes))]
        leaves = {name: state.parameters[name] for name in learned}
        learner = TaskLearner(self.reader, shape.with_tensors(state.parameters), self.learner)
        where = f"step {state.step + 1}, on {[e.corpus for e in own]}"
        try:
            gradients, loss, accuracy = self.algorithm.gradient(learner, own, leaves)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise DivergedError(f"{where}: {error}; try smaller learning rates") from error
        norm = torch.stack([part.square().sum() for part in gradients.values()]).sum().sqrt()
        if not (norm.isfinite() and loss.isfinite().all()):
            raise DivergedError(
                f"{where}: losses {loss.tolist()}, gradient norm {float(norm)}; try smaller learning rates (the last "
                "checkpoint is from before)"
            )
        factor = settings.max_gradient_norm / norm.clamp(min=settings.max_gradient_norm)
        for name, leaf in leaves.items():
            leaf.grad = gradients[name] * factor
        done = state.step / settings.steps
        for group in state.optimiser.param_groups:
            group["lr"] = group["base"] * min(1.0, (state.step + 1) / settings.warmup) * (1 - done)
        state.optimiser.step()
        state.step += 1
        return {
            "step": state.step,
            "loss": round(float(loss.mean()), 4),
            "accuracy": round(float(accuracy.mean()), 4),
            "gradient_norm": round(float(norm), 4),
        }


def _plain(settings: LearnerSettings | OuterSettings) -> dict[str, Any]:
    """Return settings as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()}
