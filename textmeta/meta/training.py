"""The outer loop: sample episodes, take the meta-gradient, reduce it over processes, step, validate, checkpoint."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from textmeta.data.episodes import Episode, EpisodeSampler
from textmeta.errors import SettingsError, TrainingInterrupted
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.algorithms import ALGORITHMS, Algorithm
from textmeta.meta.checkpoint import TrainingState, restore_state, save_state
from textmeta.meta.evaluation import score_episodes
from textmeta.meta.fingerprint import run_fingerprint
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.interruption import stop_requests
from textmeta.meta.outer_step import outer_step
from textmeta.meta.record import Record
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import LORA, Parameters, is_scalar
from textmeta.model.pretrained import tensors_digest

__all__ = ["TrainingResult", "train"]

logger = logging.getLogger(__name__)

CHECKPOINT, RECORD = "checkpoint.safetensors", "record.jsonl"


@dataclass(frozen=True)
class TrainingResult:
    """What :func:`train` returns.

    Args:
        parameters: those with the best validation accuracy.
        inner: the inner loop that they were learned for.
        record: how they were learned, without anything that differs between two equal runs.
    """

    parameters: Parameters
    inner: InnerLoopSettings
    record: dict[str, Any]


def train(
    encoder: Encoder,
    train_episodes: EpisodeSampler,
    valid_episodes: EpisodeSampler,
    settings: TrainingSettings,
    inner: InnerLoopSettings,
    output: Path,
    accelerator: Accelerator | None = None,
    start: Mapping[str, Tensor] | None = None,
    on_validation: Callable[[int, float], None] | None = None,
) -> TrainingResult:
    """Meta-learn an initialisation.

    Step s uses episodes s·T to s·T + T - 1 of ``train_episodes``, whatever the number of processes. ``output`` gets a
    checkpoint and ``record.jsonl`` (a JSON object a step); where it has a checkpoint of a run with the same settings,
    the run goes on from there, to the same bits on the same machine as if it had not been interrupted.

    Args:
        encoder: on the accelerator's device.
        train_episodes: to learn from.
        valid_episodes: to choose the best step by; its classes should be no training classes.
        settings: of the outer loop.
        inner: of the inner loop.
        output: folder of the run.
        accelerator: for several processes; by default one for this process alone.
        start: an initialisation to go on from, or its LoRA factors alone; by default LoRA's usual start.
        on_validation: called after each validation with the step and the accuracy, once the checkpoint holds that step;
            so it may end the run by an exception. Not called where a signal stops the run at that step.

    Raises:
        TrainingInterrupted: on SIGINT or SIGTERM, after writing a checkpoint.
        DivergedError: if loss or gradient are not finite.
        SettingsError: if ``output`` holds a run with other settings.
    """
    accelerator = accelerator or Accelerator(cpu=encoder.device.type == "cpu")
    algorithm = ALGORITHMS[settings.algorithm]
    given, inner = inner, algorithm.inner(inner)
    if inner != given:
        logger.info("%s takes its own inner loop: %s", settings.algorithm, inner)
    fingerprint = run_fingerprint(encoder, train_episodes, valid_episodes, training=settings, inner=inner)
    if start is not None:
        fingerprint["start"] = tensors_digest(start)
    output.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    state = _start(encoder, settings, inner, algorithm, start or {})
    if (output / CHECKPOINT).exists():
        restore_state(state, output / CHECKPOINT, fingerprint)
        logger.info("going on from step %d of %s", state.step, output / CHECKPOINT)

    validation = valid_episodes.take(settings.validation_episodes)
    with (
        stop_requests() as stop_requested,
        Record(output / RECORD, state.step, enabled=accelerator.is_main_process) as record,
        tqdm(
            total=settings.steps,
            initial=state.step,
            desc=settings.algorithm,
            unit="step",
            disable=not accelerator.is_main_process,
        ) as progress,
    ):
        while state.step < settings.steps:
            row, stop = outer_step(
                encoder, train_episodes, settings, inner, algorithm, state, accelerator, stop_requested()
            )
            validated = state.step % settings.validate_every == 0 or state.step == settings.steps
            if validated:
                row["valid_accuracy"] = _validate(encoder, state, validation, inner, accelerator)
            record.write(row)
            shown = {"loss": row["loss"], "acc": row["accuracy"]}
            progress.set_postfix(shown | ({"best_valid": state.best_accuracy} if state.best else {}), refresh=False)
            progress.update()
            if accelerator.num_processes == 1:  # several have to agree, in the next step's reduction
                stop = stop or stop_requested()
            due = state.step % settings.checkpoint_every == 0 or state.step == settings.steps
            due = due or (validated and on_validation is not None)
            if (due or stop) and accelerator.is_main_process:
                save_state(state, output / CHECKPOINT, fingerprint)
            if stop:
                raise TrainingInterrupted(
                    f"stopped after step {state.step} of {settings.steps}; the same command goes on from "
                    f"{output / CHECKPOINT}"
                )
            if validated and on_validation is not None:
                on_validation(state.step, row["valid_accuracy"])
    accelerator.wait_for_everyone()
    summary = {
        "steps": settings.steps,
        "episodes": settings.steps * settings.tasks_per_step,
        "best_step": state.best_step,
        "valid_accuracy": state.best_accuracy,
        "settings": fingerprint,
        "sources": [dict(corpus.source) for corpus in train_episodes.corpora],
    }
    return TrainingResult(state.best, inner, summary)


def _validate(
    encoder: Encoder,
    state: TrainingState,
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    accelerator: Accelerator,
) -> float:
    """Return validation accuracy, each process scoring its share; keep the parameters if they are the best yet."""
    mine = episodes[accelerator.process_index :: accelerator.num_processes]
    as_trained = replace(inner, strengths=(1.0,))  # the prior of the others is learned after training
    scores = score_episodes(encoder, state.parameters, mine, as_trained) if mine else None
    total = torch.tensor([scores.accuracy.sum() if scores else 0.0], device=encoder.device, dtype=torch.float32)
    accuracy = float(accelerator.reduce(total, "sum")) / len(episodes)
    if accuracy > state.best_accuracy:
        state.best_accuracy, state.best_step = accuracy, state.step
        state.best = {name: value.detach().clone() for name, value in state.parameters.items()}
    return accuracy


def _start(
    encoder: Encoder,
    settings: TrainingSettings,
    inner: InnerLoopSettings,
    algorithm: Algorithm,
    given: Mapping[str, Tensor],
) -> TrainingState:
    usual = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size, settings.seed)
    # of another inner loop, step sizes and scalars may have no place here; LoRA factors must fit
    fitting = {name for name, value in given.items() if name in usual and value.shape == usual[name].shape}
    wrong = sorted(name for name in given if name.startswith(LORA) and name not in fitting)
    if wrong:
        raise SettingsError(f"the start given for {wrong[0]} does not fit the encoder ({len(wrong)} such factors)")
    parameters = {
        name: (given[name] if name in fitting else value).to(encoder.device, copy=True).requires_grad_()
        for name, value in usual.items()
    }
    rate = algorithm.learning_rate if settings.learning_rate is None else settings.learning_rate
    scalars = {name for name in parameters if is_scalar(name)}
    groups = [
        {"params": [v for n, v in parameters.items() if n not in scalars], "base": rate},
        {"params": [v for n, v in parameters.items() if n in scalars], "base": settings.scalar_learning_rate},
    ]
    optimiser: torch.optim.Optimizer
    optimiser = torch.optim.Adam(groups) if algorithm.optimiser == "adam" else torch.optim.SGD(groups)
    return TrainingState(parameters, optimiser)
