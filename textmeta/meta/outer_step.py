"""A step of the outer loop: own episodes, one reduction over processes, the optimiser."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from textmeta.data.episodes import EpisodeSampler
from textmeta.errors import DivergedError
from textmeta.meta.algorithms import Algorithm
from textmeta.meta.checkpoint import TrainingState
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.self_supervision import by_condition, self_supervised_gradient
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import Parameters

__all__ = ["outer_step"]

SELF_SUPERVISED = 10**9  # number of the first episode that only the task encoder sees


def outer_step(
    encoder: Encoder,
    sampler: EpisodeSampler,
    settings: TrainingSettings,
    inner: InnerLoopSettings,
    algorithm: Algorithm,
    state: TrainingState,
    accelerator: Accelerator,
    stop_requested: bool,
) -> tuple[dict[str, float], bool]:
    """Take one step, in place; return its row of the record and whether any process was asked to stop.

    Args:
        encoder: makes features.
        sampler: of the episodes to learn from.
        settings: of the outer loop.
        inner: of the inner loop.
        algorithm: makes the meta-gradient.
        state: parameters, optimiser and number of the step; changed.
        accelerator: of the processes that share the step's episodes.
        stop_requested: whether this process was asked to stop.

    Raises:
        DivergedError: if loss or gradient are not finite.
    """
    sums, totals = _own_share(encoder, sampler, settings, inner, algorithm, state, accelerator)
    totals[3] = float(stop_requested)
    # one reduction for everything; the mean is over tasks, so that uneven shares weigh right
    flat: Tensor = torch.cat([*(part.flatten() for part in sums.values()), totals])
    flat = accelerator.reduce(flat, "sum")
    totals = flat[-4:]
    mean = flat[:-4] / totals[2]
    norm = mean.norm()
    if not (norm.isfinite() and totals[0].isfinite()):
        raise DivergedError(
            f"step {state.step + 1}: loss {float(totals[0] / totals[2])}, gradient norm {float(norm)}; try "
            "a smaller learning rate or smaller inner step sizes (the last checkpoint is from before)"
        )
    if algorithm.optimiser == "adam" and settings.max_gradient_norm is not None:
        mean = mean * (settings.max_gradient_norm / norm.clamp(min=settings.max_gradient_norm))
    _apply(mean, state, _schedule(state.step, settings) if algorithm.optimiser == "adam" else 1.0)
    row = {
        "step": state.step,
        "loss": float(totals[0] / totals[2]),
        "accuracy": float(totals[1] / totals[2]),
        "gradient_norm": float(norm),
        "learning_rate": state.optimiser.param_groups[0]["lr"],
    }
    return row, bool(totals[3] > 0)


def _own_share(
    encoder: Encoder,
    sampler: EpisodeSampler,
    settings: TrainingSettings,
    inner: InnerLoopSettings,
    algorithm: Algorithm,
    state: TrainingState,
    accelerator: Accelerator,
) -> tuple[Parameters, Tensor]:
    """Return what this process's episodes add to a step: gradients, and (4,) loss, accuracy, tasks and a 0."""
    first = state.step * settings.tasks_per_step
    mine = range(first + accelerator.process_index, first + settings.tasks_per_step, accelerator.num_processes)
    sums = {name: torch.zeros_like(value) for name, value in state.parameters.items()}
    totals = torch.zeros(4, device=encoder.device)  # loss, accuracy, tasks, processes asked to stop
    for loop, indices in by_condition(inner, settings.unconditioned, settings.seed, mine):
        episodes = [sampler[index] for index in indices]
        result = algorithm.gradient(encoder, state.parameters, episodes, loop, settings.meta_gradient)
        sums = {name: value + result.gradient[name] for name, value in sums.items()}
        totals[:3] += torch.stack([result.loss.sum(), result.accuracy.sum(), totals.new_tensor(len(indices))])
    if inner.conditioning is not None and settings.self_supervision.episodes and accelerator.is_main_process:
        others = SELF_SUPERVISED + state.step * settings.self_supervision.episodes
        further = sampler.take(settings.self_supervision.episodes, others)
        found = self_supervised_gradient(encoder, state.parameters, further, inner, settings.self_supervision)
        for name, part in found.items():  # times the tasks, by which the sum is divided
            sums[name] = sums[name] + settings.tasks_per_step * part
    return sums, totals


def _apply(gradient: Tensor, state: TrainingState, scale: float) -> None:
    """Let the optimiser take a step along a gradient, all parameters in one row, at so much of its learning rates."""
    pieces = torch.split(gradient, [value.numel() for value in state.parameters.values()])
    for value, piece in zip(state.parameters.values(), pieces, strict=True):
        value.grad = piece.view_as(value)
    for group in state.optimiser.param_groups:
        group["lr"] = group["base"] * scale
    state.optimiser.step()
    state.step += 1


def _schedule(step: int, settings: TrainingSettings) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / max(1, settings.steps - settings.warmup)))
