"""The outer loop: steps of Adam on the meta-gradients of episodes, from a run's start, or from where it was stopped."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import DivergedError, SettingsError, TrainingInterrupted, logger
from textmeta.files import CHECKPOINT
from textmeta.meta.adapter import Adapter
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.checkpoint import TrainingState, open_record, restore_state, save_state, stop_requests
from textmeta.meta.evaluation import half_width, score_episodes
from textmeta.meta.initialisation import LORA
from textmeta.meta.learner import TaskLearner
from textmeta.meta.plan import is_memory_full
from textmeta.meta.watching import draw_curves, trackers
from textmeta.processes import exchange, shared_out
from textmeta.progress import progress_bar

if TYPE_CHECKING:
    from textmeta.meta.trainer import MetaTrainer

Callback = Callable[[dict[str, Any]], object]

RECORD = "record.jsonl"
CENTRES = ("centre", "name_centre")  # with LoRA's factors, the groups that have learning rates of their own
CENTRE_RATE = 1e-3
WARMUP = 20  # steps over which the learning rates rise; then they fall to 0, linearly
MAX_GRADIENT_NORM = 1.0
MAX_BAD_STEPS = 5  # in a row, without a task that has a finite loss and gradient
VALIDATE_EVERY, CHECKPOINT_EVERY = 100, 50  # steps


@dataclass(frozen=True)
class Run:
    """A run in progress."""

    trainer: "MetaTrainer"
    accelerator: Accelerator
    reader: TokenStateReader
    adapter: Adapter  # with the shapes of all tensors
    episodes: MixedEpisodes
    corpora: Sequence[Corpus]
    valid: Sequence[Corpus]
    validation: Sequence[Episode]
    tensors: Mapping[str, Tensor]  # that it starts from
    output: Path | None
    fingerprint: Mapping[str, Any]
    callback: Callback | None

    @property
    def learned(self) -> list[str]:
        """Names of the tensors that are not fixed."""
        return [name for name in self.adapter.initialisation.tensors() if not name.startswith(self.trainer.fixed)]

    def check_fixed(self) -> None:
        """Check that the settings fix tensors that are there, and leave some to learn in every step."""
        names, fixed = self.adapter.initialisation.tensors(), self.trainer.fixed
        for given in fixed:
            if not any(name.startswith(given) for name in names):
                shown = dict.fromkeys(LORA if name.startswith(LORA) else name for name in names)
                raise SettingsError(f"fixed names {given!r}, but there are {', '.join(shown)}")
        if not self.learned:
            raise SettingsError(f"fixed ({', '.join(map(repr, fixed)):.200}) leaves nothing to learn")

    def state(self) -> TrainingState:
        """Return where the run starts, or where it was stopped."""
        device = self.reader.encoder.device
        parameters = {name: value.detach().clone().to(device) for name, value in self.tensors.items()}
        for name in self.learned:
            parameters[name].requires_grad_()
        state = TrainingState(parameters, torch.optim.Adam(self._groups(parameters)))
        if self.output is not None:
            restore_state(state, self.output / CHECKPOINT, self.fingerprint)
        return state

    def loop(self, state: TrainingState) -> dict[str, Tensor]:
        """Take all steps; return what was learned: the last tensors, or those with the best validation accuracy."""
        trainer, main, validation = self.trainer, self.accelerator.is_main_process, self.validation
        output, fingerprint = self.output, self.fingerprint
        assert output is not None
        output.mkdir(parents=True, exist_ok=True)
        steps = {*shared_out(lambda own: [state.step], range(self.accelerator.num_processes))}
        if len(steps) > 1:
            told = f"processes would go on from different steps ({sorted(steps)})"
            raise SettingsError(f"{told}: all machines must see {output}")
        with (
            stop_requests() as stop_signal,
            open_record(output / RECORD, state.step, enabled=main) as write_row,
            trackers(self.accelerator, output, state.step),
            progress_bar(trainer.steps, trainer.algorithm, "step", initial=state.step) as progress,
        ):
            enough = False  # says the callback
            while not self.is_over(state):
                row, stop = self._step(state, enough or stop_signal() > 0)
                good = not state.bad_steps
                if validation and (state.step % VALIDATE_EVERY == 0 or state.step == trainer.steps):
                    row |= self._validate(state, validation)
                write_row(row)
                self.accelerator.log({name: value for name, value in row.items() if name != "dropped"}, state.step)
                shown = {"loss": f"{row['loss']:.3f}", "acc": f"{row['accuracy']:.3f}"} if good else {}
                if state.best:
                    shown["best"] = f"{state.best_accuracy:.3f}"
                progress.set_postfix(shown, refresh=False)
                progress.update()
                enough = enough or bool(main and self.callback and self.callback(row))
                if self.accelerator.num_processes == 1:  # several have to agree, in the next step's reduction
                    stop = stop or enough or stop_signal() > 0
                over = self.is_over(state)
                if main and (stop or over or (good and state.step % CHECKPOINT_EVERY == 0)):
                    save_state(state, output / CHECKPOINT, fingerprint)
                if main and (stop or over):
                    draw_curves(output / RECORD)
                if stop and not over:
                    # any process may have got the signal; if none has, it was the callback
                    if signum := max(shared_out(lambda own: [stop_signal()], range(self.accelerator.num_processes))):
                        told = f"stopped after step {state.step} of {trainer.steps}; the same command goes on from"
                        raise TrainingInterrupted(f"{told} {output / CHECKPOINT}", signum)
                    break
        if main and trainer.patience and state.without_gain >= trainer.patience:
            logger.info(f"no gain in {trainer.patience} validations: training ended after step {state.step}")
        with exchange():
            self.accelerator.wait_for_everyone()
        return {name: value.detach() for name, value in (state.best or state.parameters).items()}

    def is_over(self, state: TrainingState) -> bool:
        """Return whether no step is left to take."""
        patience = self.trainer.patience
        return state.step >= self.trainer.steps or (patience > 0 and state.without_gain >= patience)

    def _groups(self, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return the optimiser's groups: LoRA, numbers and centres, each with its rate."""
        trainer, learned = self.trainer, self.learned
        lora = [name for name in learned if name.startswith(LORA)]
        centres = [name for name in learned if name in CENTRES]
        numbers = [name for name in learned if name not in lora and name not in centres]
        rates = ((lora, trainer.lora_rate), (numbers, trainer.number_rate), (centres, CENTRE_RATE))
        return [{"params": [parameters[n] for n in part], "lr": rate, "base": rate} for part, rate in rates if part]

    def _step(self, state: TrainingState, stop: bool) -> tuple[dict[str, Any], bool]:
        """Take one outer step, in place; return its row of the record, and whether any process was asked to stop.

        Tasks without a finite loss and gradient are left out; a step of such alone changes no tensor.
        """
        trainer, own = self.trainer, self.learned
        first = state.step * trainer.tasks_per_step
        numbers = range(first, min(first + trainer.tasks_per_step, trainer.episodes))
        mine = numbers[self.accelerator.process_index :: self.accelerator.num_processes]
        share, dropped = self.own_share(state, {number: self.episodes[number] for number in mine})
        told = [float(stop), *(float(number in dropped) for number in numbers)]
        # one reduction for everything; the mean is over tasks, so that uneven shares weigh right
        flat: Tensor = torch.cat([share, share.new_tensor(told)])
        with exchange():
            flat = self.accelerator.reduce(flat, "sum")
        totals = flat[-len(told) - 3 :]
        mean = flat[: -len(totals)] / totals[2]
        norm = mean.norm()
        loss, accuracy = (totals[:2] / totals[2]).tolist()
        state.step += 1
        row: dict[str, Any] = {"step": state.step}
        left_out = [number for number, flag in zip(numbers, totals[4:].tolist(), strict=True) if flag]
        if left_out:
            row["dropped"] = [{"episode": number, "corpus": self.episodes[number].corpus} for number in left_out]
            if self.accelerator.is_main_process:
                named = ", ".join(f"episode {each['episode']} of {each['corpus']}" for each in row["dropped"])
                logger.warning("step %d: no finite loss and gradient on %s: left out", state.step, named)
        if not (norm.isfinite() and math.isfinite(loss)):
            state.bad_steps += 1
            if state.bad_steps >= min(MAX_BAD_STEPS, trainer.steps):
                on = f"step {state.step}, on {[self.episodes[number].corpus for number in numbers]}"
                why = f"the last {state.bad_steps} steps had no finite loss and gradient; try smaller learning rates"
                raise DivergedError(f"{on}: {why} (the checkpoint is of the last good steps)")
            return row, bool(totals[3] > 0)
        state.bad_steps = 0
        mean = mean * (MAX_GRADIENT_NORM / norm.clamp(min=MAX_GRADIENT_NORM))
        for value in state.parameters.values():
            value.grad = None
        for name, piece in zip(own, mean.split([state.parameters[name].numel() for name in own]), strict=True):
            state.parameters[name].grad = piece.view_as(state.parameters[name])
        rate = min(1.0, state.step / WARMUP) * (1 - (state.step - 1) / trainer.steps)
        for group in state.optimiser.param_groups:
            group["lr"] = group["base"] * rate
        state.optimiser.step()
        found = {"loss": loss, "accuracy": accuracy, "gradient_norm": float(norm)}
        return {**row, **{name: round(value, 4) for name, value in found.items()}}, bool(totals[3] > 0)

    def own_share(self, state: TrainingState, episodes: Mapping[int, Episode]) -> tuple[Tensor, set[int]]:
        """Return what this process's episodes add to a step, as one vector, and the numbers of those left out.

        The vector is the gradients, one after the other, then loss, accuracy and number of tasks. Episodes that are too
        much for the memory together, or of which one has no finite loss and gradient, are halved until it is known
        which. SettingsError if one alone is too much.
        """
        leaves = {name: state.parameters[name] for name in self.learned}
        nothing = self.adapter.initialisation.queries.new_zeros(sum(value.numel() for value in leaves.values()) + 3)
        if not episodes:
            return nothing, set()
        learner, full = TaskLearner(self.reader, self._with(state.parameters)), ""
        try:
            found = ALGORITHMS[self.trainer.algorithm].gradient(learner, list(episodes.values()), leaves)
            sums = torch.stack([found.loss.sum(), found.accuracy.sum(), nothing.new_tensor(len(episodes))])
            share = torch.cat([*(found.gradient[name].flatten() for name in leaves), sums])
            if share.norm().isfinite():
                return share, set()
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            logger.debug("no finite loss: %s", error)
        except (RuntimeError, MemoryError) as error:
            if not is_memory_full(error):
                raise
            full = f"{error!s:.200}"
        if len(episodes) > 1:  # now that the error, which holds on to the memory, is gone
            if full:
                said = "step %d: %d tasks together are too much for the memory: halved"
                logger.warning(said, state.step + 1, len(episodes))
            torch.cuda.empty_cache()
            half = len(episodes) // 2
            parts = [dict(list(episodes.items())[part]) for part in (slice(half), slice(half, None))]
            (one, of_one), (other, of_other) = (self.own_share(state, part) for part in parts)
            return one + other, of_one | of_other
        ((number, episode),) = episodes.items()
        if full:
            texts = f"{len(episode.support_texts)} examples of {episode.ways} classes"
            told = f"step {state.step + 1}: the memory of {nothing.device} is too small for episode {number} alone"
            smaller = "encoder.max_length, lora.layers or learner.steps, or learner.adapt pooling"
            raise SettingsError(f"{told} ({episode.corpus}, {texts}); try a smaller {smaller} ({full})")
        return nothing, {number}

    def _with(self, parameters: Mapping[str, Tensor]) -> Adapter:
        return replace(self.adapter, initialisation=self.adapter.initialisation.with_tensors(parameters))

    def _validate(self, state: TrainingState, episodes: Sequence[Episode]) -> dict[str, float]:
        """Return validation accuracy and its interval; keep the tensors if they are the best yet.

        A gain is told by the paired difference from the last gain, for small ones, each within the noise, may add up.
        """
        learner = TaskLearner(self.reader, self._with({n: v.detach() for n, v in state.parameters.items()}))
        each = score_episodes(learner, episodes, together=True).accuracy
        accuracy = float(np.float32(each.sum())) / len(episodes)
        if accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            state.best = {name: value.detach().clone() for name, value in state.parameters.items()}
        if self.trainer.patience:
            gain = None if state.last_gain is None else each - state.last_gain.numpy()
            state.without_gain += 1
            if gain is None or gain.mean() > half_width(gain):
                state.last_gain, state.without_gain = torch.tensor(each), 0
        return {"valid_accuracy": accuracy, "valid_accuracy_ci95": half_width(each)}
