"""Meta-training: episodes of many corpora, the gradient of what their queries lose after the inner steps, Adam."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.data.labels import number, one_of, whole_number
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.data.overview import log_corpora, warn_of_overlap
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.pretrained import tensors_digest
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, SettingsError, logger
from textmeta.files import at_home
from textmeta.hub import HubAccess
from textmeta.meta.adapter import Adapter
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.calibration import episodes_with_outside, fit_calibration
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner
from textmeta.meta.outer_loop import Callback, Run
from textmeta.meta.plan import bytes_of, check_room, naming_rows, plan_of
from textmeta.meta.watching import tracking
from textmeta.processes import join_processes

LEAST_RATE = 1e-12
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
        names: share of the episodes with names of their classes.
        unlabelled: share of the episodes that come with unlabelled texts.
        fixed: names of tensors, or beginnings of them, that are not learned.
        precision: "bf16" runs the encoder's matrix products in bfloat16, "no" all in float32.
        patience: validations in a row without a gain after which training ends; 0 takes all steps.
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
    patience: int = 0

    def __post_init__(self) -> None:
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
        for name in ("seed", "patience"):
            whole_number(name, getattr(self, name), 0)

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
        callback: Callback | None = None,
        track: Any = (),
    ) -> Adapter:
        """Learn an adapter; the same settings and corpora give the same one, to the bit on the same machine.

        Step s uses the episodes s·T to s·T + T - 1, whatever the number of processes.

        Args:
            corpora: one or several, to draw episodes from.
            valid: whose classes no training corpus has; the tensors that tell their episodes best are the result. By
                default the last ones are.
            output: folder of the run, for its checkpoints, ``record.jsonl`` (a row a step) and ``curves.png``. A run
                with the same settings that was stopped goes on from there. By default nothing is kept.
            start: an adapter, or tensors by name, to go on from.
            cache: folder for what the frozen layers make of the texts, which other runs share; by default memory.
            access: how the Hub is reached for the encoder.
            callback: called after each step, by the main process, with the step's row of the record; if it returns
                True, no further step is taken (by several processes one), and what was learned is the result.
            track: which of accelerate's trackers get the rows, too, such as "tensorboard"; one or several.

        Raises:
            TrainingInterrupted: on SIGINT or SIGTERM, after writing a checkpoint.
            DivergedError: if loss or gradient of all tasks are not finite, five steps in a row.
            SettingsError: if ``output`` holds a run with other settings, ``start`` does not fit, ``fixed`` names no
                tensor or leaves none to learn, ``patience`` has nothing to validate on, a tracker is not there, or
                there are more processes than tasks in a step.
            LostProcessError: if another process of the run ends or hangs.
            DataError: if a corpus has too few classes or texts.
        """
        if output is None:
            with tempfile.TemporaryDirectory() as folder:
                how: dict[str, Any] = {"start": start, "cache": cache, "access": access, "callback": callback}
                return self.train(corpora, valid, folder, track=track, **how)
        run = self._begin(corpora, valid, at_home(Path(output)), start, access, callback, track)
        reader, learner = run.reader, run.adapter.learner
        state = run.state()
        with naming_rows(run):
            if run.accelerator.is_main_process and logger.isEnabledFor(logging.INFO) and not run.is_over(state):
                logger.info(plan_of(run, state, keep=cache is None))
            texts = (corpus.texts for corpus in run.corpora)
            reader.cache(*texts, folder=cache and at_home(cache))
            found = run.loop(state)
        record = {"settings": run.fingerprint, "sources": [dict(corpus.source) for corpus in run.corpora]}
        made = run.adapter.initialisation.with_tensors(found)
        adapter = replace(Adapter.of(reader, learner, made), record=record)
        outside = episodes_with_outside(run.episodes, min(CALIBRATION_EPISODES, max(50, self.episodes // 10)))
        if outside:
            rule = fit_calibration(TaskLearner(reader, adapter), outside, "calibration", together=True)
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

        The largest of the next steps is taken, and thrown away. What it took is kept in the Hub library's cache, and
        so the same plan is there sooner the next time; nothing else is written.
        """
        run = self._begin(corpora, valid, output if output is None else at_home(Path(output)), start, access)
        with naming_rows(run):
            return plan_of(run, run.state(), remember=True)

    def _begin(
        self,
        corpora: Corpus | Sequence[Corpus],
        valid: Corpus | Sequence[Corpus],
        output: Path | None,
        start: Adapter | Mapping[str, Tensor] | None,
        access: HubAccess | None,
        callback: Callback | None = None,
        track: Any = (),
    ) -> Run:
        """Return a run that can begin: what might fail is made and checked."""
        assert isinstance(self.encoder, EncoderSettings)
        corpora, valid = ((given,) if isinstance(given, Corpus) else tuple(given) for given in (corpora, valid))
        if self.patience and not valid:
            raise SettingsError(f"patience is {self.patience}, but there are no corpora to validate on")
        accelerator = join_processes(**(tracking(track, output) if output else {}))
        if self.tasks_per_step < accelerator.num_processes:
            few = f"tasks_per_step is {self.tasks_per_step}, too few for {accelerator.num_processes} processes"
            raise SettingsError(f"{few}, each of which is to learn at least one task a step")
        episodes = MixedEpisodes(corpora, self.seed, names=self.names, unlabelled=self.unlabelled)
        if accelerator.is_main_process:
            log_corpora(corpora, episodes.corpora)
            warn_of_overlap(corpora, valid, "choose by")
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
        told = {  # all that decides what a run ends in
            **asdict(self),
            "learner": asdict(learner),
            "encoder": {
                "max_length": encoder.settings.max_length,
                "weights_sha256": encoder.weights_sha256,
                **({"long_texts": "window"} if encoder.settings.long_texts == "window" else {}),
            },
            "corpora": [corpus.summary for corpus in corpora],
            "valid": [corpus.summary for corpus in valid],
        }
        fingerprint = json.loads(json.dumps(told))  # as it comes back from a checkpoint
        if begun:
            fingerprint["start"] = tensors_digest(begun)
        validation = judges.take(VALIDATION_EPISODES) if judges else []
        adapter = Adapter.of(reader, learner, shape).to(encoder.device)
        data = (corpora, valid, validation)
        run = Run(self, accelerator, reader, adapter, episodes, *data, tensors, output, fingerprint, callback)
        run.check_fixed()
        if output is not None:
            check_room(output, bytes_of(run))
        return run
