"""Meta-training: episodes of many corpora, the gradient of what their queries lose after the inner steps, Adam."""

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
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
from textmeta.meta.plan import bytes_of, check_room, is_memory_full, naming_rows, plan_of

__all__ = ["MetaTrainer", "Run"]

logger = logging.getLogger(__name__)

RECORD = "record.jsonl"
CENTRES = ("centre", "name_centre")  # with LoRA's factors, the groups that have learning rates of their own
CENTRE_RATE = 1e-3
LEAST_RATE = 1e-12
WARMUP = 20  # steps over which the learning rates rise; then they fall to 0, linearly
MAX_GRADIENT_NORM = 1.0
MAX_BAD_STEPS = 5  # in a row, without a task that has a finite loss and gradient
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

        Raises:
            TrainingInterrupted: on SIGINT or SIGTERM, after writing a checkpoint.
            DivergedError: if loss or gradient of all tasks are not finite, five steps in a row.
            SettingsError: if ``output`` holds a run with other settings, ``start`` does not fit, or ``fixed`` names no
                tensor or leaves none to learn.
            DataError: if a corpus has too few classes or texts.
        """
        if output is None:
            with tempfile.TemporaryDirectory() as folder:
                return self.train(corpora, valid, folder, start=start, cache=cache, access=access)
        run = self._begin(corpora, valid, at_home(Path(output)), start, access)
        main, reader, learner = run.accelerator.is_main_process, run.reader, run.adapter.learner
        state = run.state()
        if main and logger.isEnabledFor(logging.INFO) and state.step < self.steps:
            logger.info(plan_of(run, state, keep=cache is None))
        with naming_rows(run):
            reader.cache(*(corpus.texts for corpus in run.corpora), folder=cache and at_home(cache), progress=main)
            found = run.loop(state)
        record = {"settings": run.fingerprint, "sources": [dict(corpus.source) for corpus in run.corpora]}
        made = run.adapter.initialisation.with_tensors(found)
        adapter = replace(Adapter.of(reader, learner, made), record=record)
        outside = episodes_with_outside(run.episodes, min(CALIBRATION_EPISODES, max(50, self.episodes // 10)))
        if outside:
            rule = fit_calibration(TaskLearner(reader, adapter), outside, "calibration" if main else None)
            adapter = replace(adapter, scope=rule)
        return adapter

    @torch.inference_mode(False)
    def plan(
        self,
        corpora: Corpus | Sequence[Corpus],
        valid: Corpus | Sequence[Corpus] = (),
        output: Path | str | None = None,
        *,
        start: Adapter | Mapping[str, Tensor] | None = None,
        access: HubAccess | None = None,
    ) -> str:
        """Return what :meth:`train` would do and take, in ten lines; what it takes and raises is said there.

        The largest of the next steps is taken, and thrown away. Nothing is written.
        """
        run = self._begin(corpora, valid, output if output is None else at_home(Path(output)), start, access)
        with naming_rows(run):
            return plan_of(run, run.state())

    def _begin(
        self,
        corpora: Corpus | Sequence[Corpus],
        valid: Corpus | Sequence[Corpus],
        output: Path | None,
        start: Adapter | Mapping[str, Tensor] | None,
        access: HubAccess | None,
    ) -> "Run":
        """Return a run that can begin: what might fail is made and checked."""
        assert isinstance(self.encoder, EncoderSettings)
        corpora, valid = ((given,) if isinstance(given, Corpus) else tuple(given) for given in (corpora, valid))
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
        fingerprint = self._fingerprint(encoder, learner, corpora, valid)
        if begun:
            fingerprint["start"] = tensors_digest(begun)
        validation = judges.take(VALIDATION_EPISODES) if judges else []
        adapter = Adapter.of(reader, learner, shape).to(encoder.device)
        run = Run(
            self, accelerator, reader, adapter, episodes, corpora, valid, validation, tensors, output, fingerprint
        )
        run.check_fixed()
        if output is not None:
            check_room(output, bytes_of(run))
        return run

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
class Run:
    """A run in progress."""

    trainer: MetaTrainer
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
        if self.output is not None and (self.output / CHECKPOINT).exists():
            restore_state(state, self.output / CHECKPOINT, self.fingerprint)
        return state

    def loop(self, state: TrainingState) -> dict[str, Tensor]:
        """Take all steps; return what was learned: the last tensors, or those with the best validation accuracy."""
        trainer, main, validation = self.trainer, self.accelerator.is_main_process, self.validation
        output, fingerprint = self.output, self.fingerprint
        assert output is not None
        output.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        with (
            stop_requests() as stop_requested,
            open_record(output / RECORD, state.step, enabled=main) as write_row,
            tqdm(None, trainer.algorithm, trainer.steps, unit="step", initial=state.step, disable=not main) as progress,
        ):
            while state.step < trainer.steps:
                row, stop = self._step(state, stop_requested())
                last, good = state.step == trainer.steps, not state.bad_steps
                if validation and good and (last or state.step % VALIDATE_EVERY == 0):
                    row["valid_accuracy"] = self._validate(state, validation)
                write_row(row)
                shown = {"loss": f"{row['loss']:.3f}", "acc": f"{row['accuracy']:.3f}"} if good else {}
                if state.best:
                    shown["best"] = f"{state.best_accuracy:.3f}"
                progress.set_postfix(shown, refresh=False)
                progress.update()
                if self.accelerator.num_processes == 1:  # several have to agree, in the next step's reduction
                    stop = stop or stop_requested()
                stop = stop and not last
                if main and (stop or last or (good and state.step % CHECKPOINT_EVERY == 0)):
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
        flat: Tensor = self.accelerator.reduce(torch.cat([share, share.new_tensor(told)]), "sum")
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
