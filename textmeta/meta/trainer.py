"""Meta-training: episodes of many corpora, the gradient of what their queries lose after the inner steps, Adam."""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.data.labels import number, one_of, whole_number
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.pretrained import tensors_digest
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, DivergedError, SettingsError, TrainingInterrupted
from textmeta.files import CHECKPOINT, at_home
from textmeta.hub import HubAccess
from textmeta.meta.adapter import Adapter
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.calibration import episodes_with_outside, fit_calibration
from textmeta.meta.checkpoint import TrainingState, open_record, restore_state, save_state, stop_requests
from textmeta.meta.evaluation import score_episodes
from textmeta.meta.initialisation import LORA, Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner

__all__ = ["MetaTrainer"]

RECORD = "record.jsonl"
CENTRES = ("centre", "name_centre")  # with LoRA's factors, the groups that have learning rates of their own
CENTRE_RATE = 1e-3
LEAST_RATE = 1e-12
WARMUP = 20  # steps over which the learning rates rise; then they fall to 0, linearly
MAX_GRADIENT_NORM = 1.0
VALIDATE_EVERY, CHECKPOINT_EVERY = 100, 50  # steps
VALIDATION_EPISODES = 100  # the same each time
CALIBRATION_EPISODES = 400  # at most; else a tenth of those of training, but 50


@dataclass(frozen=True)
class MetaTrainer:
    """Learns an adapter over episodes of labelled corpora.

    Every tensor of the :class:`~textmeta.meta.initialisation.Initialisation` is learned together.

    Args:
        encoder: which one, and how long texts may be; a string names the encoder alone.
        lora: of the adapter.
        learner: how tasks are learned.
        algorithm: one of :data:`~textmeta.meta.algorithms.ALGORITHMS`.
        episodes: how many are seen in all.
        tasks_per_step: episodes whose gradients are averaged in one step of Adam, over all processes.
        lora_rate: learning rate of LoRA's factors.
        number_rate: of numbers and pooling queries.
        names: share of the episodes that come with names of their classes.
        unlabelled: share of the episodes that come with unlabelled texts.
        fixed: names of tensors, or beginnings of them, that are not learned.
        precision: "bf16" runs the encoder's matrix products in bfloat16, "no" all in float32.
        seed: of LoRA's start and of all episodes.
    """

    encoder: EncoderSettings | str = field(default_factory=EncoderSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    algorithm: str = "maml"
    episodes: int = 2000
    tasks_per_step: int = 2
    lora_rate: float = 5e-4
    number_rate: float = 0.02
    names: float = 0.6
    unlabelled: float = 0.2
    fixed: tuple[str, ...] = ()
    precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if isinstance(self.encoder, str):
            object.__setattr__(self, "encoder", EncoderSettings(self.encoder))
        object.__setattr__(self, "fixed", (self.fixed,) if isinstance(self.fixed, str) else tuple(self.fixed))
        one_of("algorithm", self.algorithm, sorted(ALGORITHMS))
        learner = ALGORITHMS[self.algorithm].learner(self.learner)
        for setting in fields(LearnerSettings):
            given, made = getattr(self.learner, setting.name), getattr(learner, setting.name)
            if given not in (made, setting.default):
                raise SettingsError(f"{self.algorithm} sets the learner's {setting.name} to {made!r}, given {given!r}")
        for name in ("episodes", "tasks_per_step"):
            whole_number(name, getattr(self, name), 1)
        for name in ("lora_rate", "number_rate"):
            number(name, getattr(self, name), LEAST_RATE)
        for name in ("names", "unlabelled"):
            number(name, getattr(self, name), 0, 1)
        whole_number("seed", self.seed, 0)

    @property
    def steps(self) -> int:
        """Number of outer steps."""
        return -(-self.episodes // self.tasks_per_step)

    @torch.inference_mode(False)  # in which, and under no_grad, there would be no gradient
    def train(
        self,
        corpora: Corpus | Sequence[Corpus],
        valid: Corpus | Sequence[Corpus] = (),
        output: Path | str | None = None,
        *,
        start: Adapter | Mapping[str, Tensor] | None = None,
        cache: Path | None = None,
        access: HubAccess | None = None,
        callback: Callable[[dict[str, float]], bool | None] | None = None,
    ) -> Adapter:
        """Learn an adapter; the same settings and corpora give the same one, to the bit on the same machine.

        Step s uses the episodes s·T to s·T + T - 1, whatever the number of processes.

        Args:
            corpora: one or several, to draw episodes from.
            valid: whose classes no training corpus has; the tensors that tell their episodes best are the result. By
                default the last ones are.
            output: folder of the run, for its checkpoint and ``record.jsonl`` (a row a step). A run with the same
                settings that was stopped goes on from there. By default nothing is kept.
            start: an adapter, or tensors by name, to go on from.
            cache: folder for what the frozen layers make of the texts, which other runs share; by default memory.
            access: how the Hub is reached for the encoder.
            callback: is called with each row of the record; if it returns True, training stops.

        Raises:
            TrainingInterrupted: on SIGINT or SIGTERM, after writing a checkpoint.
            DivergedError: if loss or gradient are not finite.
            SettingsError: if ``output`` holds a run with other settings, ``start`` does not fit, or ``fixed`` names no
                tensor or leaves none to learn.
            DataError: if a corpus has too few classes or texts.
        """
        if output is None:
            with tempfile.TemporaryDirectory() as folder:
                return self.train(corpora, valid, folder, start=start, cache=cache, access=access, callback=callback)
        assert isinstance(self.encoder, EncoderSettings)
        corpora, valid = ((given,) if isinstance(given, Corpus) else given for given in (corpora, valid))
        accelerator = Accelerator()
        episodes = MixedEpisodes(corpora, self.seed, names=self.names, unlabelled=self.unlabelled)
        judges = EpisodeSampler(valid, EpisodeSettings(5, 5, 5), self.seed) if valid else None
        encoder = Encoder(self.encoder, self.lora, accelerator.device, self.precision, access=access)
        reader = TokenStateReader(encoder, self.learner.layers)
        learner = replace(ALGORITHMS[self.algorithm].learner(self.learner), layers=reader.layers)
        shape = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, learner, self.seed)
        begun = dict(start or {}) if not isinstance(start, Adapter) else start.initialisation.tensors()
        if isinstance(start, Adapter) and start.weights_sha256 != encoder.weights_sha256:
            raise SettingsError(f"the start was trained on other weights than those of {self.encoder.model}")
        try:
            tensors = shape.with_tensors({**shape.tensors(), **begun}).tensors()
        except AdapterError as error:
            raise SettingsError(f"the start does not fit: {error}") from error
        run = _Run(self, accelerator, reader, Adapter.of(reader, learner, shape).to(encoder.device), episodes)
        run.check_fixed()
        main = accelerator.is_main_process
        reader.cache(*(corpus.texts for corpus in corpora), folder=cache and at_home(cache), progress=main)
        fingerprint = self._fingerprint(encoder, learner, corpora, valid)
        if begun:
            fingerprint["start"] = tensors_digest(begun)
        validation = judges.take(VALIDATION_EPISODES) if judges else []
        found = run.loop(tensors, validation, at_home(Path(output)), fingerprint, callback)
        record = {"settings": fingerprint, "sources": [dict(corpus.source) for corpus in corpora]}
        adapter = replace(Adapter.of(reader, learner, shape.with_tensors(found)), record=record)
        outside = episodes_with_outside(episodes, min(CALIBRATION_EPISODES, max(50, self.episodes // 10)))
        if outside:
            rule = fit_calibration(TaskLearner(reader, adapter), outside, "calibration" if main else None)
            adapter = replace(adapter, scope=rule)
        return adapter

    def _fingerprint(
        self, encoder: Encoder, learner: LearnerSettings, corpora: Sequence[Corpus], valid: Sequence[Corpus]
    ) -> dict[str, Any]:
        """Return, as JSON gives it back, all that decides what a run ends in."""
        told = {
            **asdict(self),
            "learner": asdict(learner),
            "lora": asdict(encoder.lora),
            "encoder": {
                "max_length": encoder.settings.max_length,
                "weights_sha256": encoder.weights_sha256,
                **({"long_texts": "window"} if encoder.settings.long_texts == "window" else {}),
            },
            "corpora": [corpus.summary for corpus in corpora],
            "valid": [corpus.summary for corpus in valid],
        }
        return json.loads(json.dumps(told))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Run:
    """A run in progress."""

    trainer: MetaTrainer
    accelerator: Accelerator
    reader: TokenStateReader
    adapter: Adapter  # with the shapes of all tensors
    episodes: MixedEpisodes

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

    def loop(
        self,
        tensors: Mapping[str, Tensor],
        validation: Sequence[Episode],
        output: Path,
        fingerprint: Mapping[str, Any],
        callback: Callable[[dict[str, float]], bool | None] | None = None,
    ) -> dict[str, Tensor]:
        """Take all steps; return what was learned: the last tensors, or those with the best validation accuracy."""
        trainer, main = self.trainer, self.accelerator.is_main_process
        parameters = {name: value.detach().clone().to(self.reader.encoder.device) for name, value in tensors.items()}
        for name in self.learned:
            parameters[name].requires_grad_()
        state = TrainingState(parameters, torch.optim.Adam(self._groups(parameters)))
        output.mkdir(parents=True, exist_ok=True)
        if (output / CHECKPOINT).exists():
            restore_state(state, output / CHECKPOINT, fingerprint)
        self.accelerator.wait_for_everyone()
        with (
            stop_requests() as stop_requested,
            open_record(output / RECORD, state.step, enabled=main) as write_row,
            tqdm(None, trainer.algorithm, trainer.steps, unit="step", initial=state.step, disable=not main) as progress,
        ):
            while state.step < trainer.steps:
                row, stop = self._step(state, stop_requested())
                if validation and (state.step % VALIDATE_EVERY == 0 or state.step == trainer.steps):
                    row["valid_accuracy"] = self._validate(state, validation)
                write_row(row)
                if callback is not None and callback(row):
                    break
                shown = {"loss": f"{row['loss']:.3f}", "acc": f"{row['accuracy']:.3f}"}
                if state.best:
                    shown["best"] = f"{state.best_accuracy:.3f}"
                progress.set_postfix(shown, refresh=False)
                progress.update()
                if self.accelerator.num_processes == 1:  # several have to agree, in the next step's reduction
                    stop = stop or stop_requested()
                stop = stop and state.step < trainer.steps
                if main and (stop or state.step % CHECKPOINT_EVERY == 0 or state.step == trainer.steps):
                    save_state(state, output / CHECKPOINT, fingerprint)
                if stop:
                    told = f"stopped after step {state.step} of {trainer.steps}; the same command goes on from"
                    raise TrainingInterrupted(f"{told} {output / CHECKPOINT}")
        self.accelerator.wait_for_everyone()
        return {name: value.detach() for name, value in (state.best or state.parameters).items()}

    def _groups(self, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return the optimiser's groups: LoRA, numbers and centres, each with its rate."""
        trainer, learned = self.trainer, self.learned
        lora = [name for name in learned if name.startswith(LORA)]
        centres = [name for name in learned if name in CENTRES]
        numbers = [name for name in learned if name not in lora and name not in centres]
        rates = ((lora, trainer.lora_rate), (numbers, trainer.number_rate), (centres, CENTRE_RATE))
        return [{"params": [parameters[n] for n in part], "lr": rate, "base": rate} for part, rate in rates if part]

    def _step(self, state: TrainingState, stop: bool) -> tuple[dict[str, float], bool]:
        """Take one outer step, in place; return its row of the record, and whether any process was asked to stop."""
        trainer, own = self.trainer, self.learned
        first = state.step * trainer.tasks_per_step
        numbers = range(first, min(first + trainer.tasks_per_step, trainer.episodes))
        mine = [self.episodes[n] for n in numbers[self.accelerator.process_index :: self.accelerator.num_processes]]
        sums, totals = self._own_share(state, own, mine, f"step {state.step + 1}, on {[e.corpus for e in mine]}")
        totals[3] = float(stop)
        # one reduction for everything; the mean is over tasks, so that uneven shares weigh right
        flat: Tensor = self.accelerator.reduce(torch.cat([*(part.flatten() for part in sums.values()), totals]), "sum")
        totals = flat[-4:]
        mean = flat[:-4] / totals[2]
        norm = mean.norm()
        loss, accuracy = (totals[:2] / totals[2]).tolist()
        if not (norm.isfinite() and math.isfinite(loss)):
            why = f"loss {loss}, gradient norm {float(norm)}; try smaller learning rates (the last checkpoint is older)"
            raise DivergedError(f"step {state.step + 1}, on {[self.episodes[n].corpus for n in numbers]}: {why}")
        mean = mean * (MAX_GRADIENT_NORM / norm.clamp(min=MAX_GRADIENT_NORM))
        for value in state.parameters.values():
            value.grad = None
        for name, piece in zip(own, mean.split([state.parameters[name].numel() for name in own]), strict=True):
            state.parameters[name].grad = piece.view_as(state.parameters[name])
        share = min(1.0, (state.step + 1) / WARMUP) * (1 - state.step / trainer.steps)
        for group in state.optimiser.param_groups:
            group["lr"] = group["base"] * share
        state.optimiser.step()
        state.step += 1
        told = {"loss": loss, "accuracy": accuracy, "gradient_norm": float(norm)}
        return {"step": state.step, **{name: round(value, 4) for name, value in told.items()}}, bool(totals[3] > 0)

    def _own_share(
        self, state: TrainingState, learned: Sequence[str], episodes: Sequence[Episode], where: str
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return what this process's episodes add to a step: gradients, and (4,) loss, accuracy, tasks and a 0."""
        leaves = {name: state.parameters[name] for name in learned}
        totals = self.adapter.initialisation.queries.new_zeros(4)
        if not episodes:
            return {name: torch.zeros_like(value) for name, value in leaves.items()}, totals
        learner = TaskLearner(self.reader, self._with(state.parameters))
        try:
            found = ALGORITHMS[self.trainer.algorithm].gradient(learner, episodes, leaves)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise DivergedError(f"{where}: {error}; try smaller learning rates") from error
        totals[:3] = torch.stack([found.loss.sum(), found.accuracy.sum(), totals.new_tensor(len(episodes))])
        return found.gradient, totals

    def _with(self, parameters: Mapping[str, Tensor]) -> Adapter:
        return replace(self.adapter, initialisation=self.adapter.initialisation.with_tensors(parameters))

    def _validate(self, state: TrainingState, episodes: Sequence[Episode]) -> float:
        """Return validation accuracy, each process scoring its share; keep the tensors if they are the best yet."""
        mine = episodes[self.accelerator.process_index :: self.accelerator.num_processes]
        learner = TaskLearner(self.reader, self._with({n: v.detach() for n, v in state.parameters.items()}))
        total = float(score_episodes(learner, mine).accuracy.sum()) if mine else 0.0
        own = self.adapter.initialisation.queries.new_tensor([total])
        accuracy = float(self.accelerator.reduce(own, "sum")) / len(episodes)
        if accuracy > state.best_accuracy:
            state.best_accuracy, state.best_step = accuracy, state.step
            state.best = {name: value.detach().clone() for name, value in state.parameters.items()}
        return accuracy
