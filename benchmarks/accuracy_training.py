"""Meta-training for the accuracy benchmark: our recipe, and ProtoNet for as long; resumable, with its time taken."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from accuracy_cache import DiskCache
from safetensors import safe_open

from textmeta.artifact.store import save_adapter
from textmeta.cli import parse_settings
from textmeta.data.corpus import Corpus, CorpusSettings
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.files import write_atomically
from textmeta.meta.calibration import CalibrationSettings, calibrated
from textmeta.meta.evaluation import score_episodes
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.training import TrainingResult, train
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings

__all__ = ["EQUAL_TIME", "RecipeSettings", "Trained", "Trainer", "digest", "read_recipe"]

CALIBRATION_STEPS = 20  # of ProtoNet, to learn how long one takes
# ProtoNet's own number of steps is not part of a run's key: this rule is
EQUAL_TIME = f"as much processor time as textmeta's, by {CALIBRATION_STEPS} steps"


@dataclass(frozen=True)
class RecipeSettings:
    """A recipe, in the sections of recipes/meta_train.py.

    Args:
        encoder: the encoder, of all methods.
        lora: the LoRA on its upper layers.
        episodes: what training and validation episodes look like.
        inner: the inner loop.
        training: the outer loop.
        calibration: on the validation classes, after training; null for none.
        corpora: not used: the folds of the benchmark are.
    """

    encoder: EncoderSettings = field(default_factory=lambda: EncoderSettings(max_length=64, cache_mb=4096))
    lora: LoraSettings = field(default_factory=LoraSettings)
    episodes: EpisodeSettings = field(default_factory=EpisodeSettings)
    inner: InnerLoopSettings = field(default_factory=InnerLoopSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    calibration: CalibrationSettings | None = None
    corpora: list[CorpusSettings] = field(default_factory=list)

    def with_steps(self, steps: int, seed: int, validations: int = 0) -> "RecipeSettings":
        """Return the recipe with another number of outer steps and another seed.

        Args:
            steps: outer steps.
            seed: of the start and of all episodes.
            validations: how many to spread over them; 0 leaves the steps between two as they are.
        """
        every = math.ceil(steps / validations) if validations else min(self.training.validate_every, steps)
        warmup = min(self.training.warmup, steps // 4)
        return replace(
            self, training=replace(self.training, steps=steps, seed=seed, validate_every=every, warmup=warmup)
        )

    @property
    def digest(self) -> str:
        """Hash of what is learned how, but for the seed."""
        return digest([self.training_digest, None if self.calibration is None else asdict(self.calibration)])

    @property
    def training_digest(self) -> str:
        """The same of training alone, without the calibration that follows."""
        parts = {name: asdict(getattr(self, name)) for name in ("lora", "episodes", "inner", "training")}
        del parts["training"]["seed"], parts["training"]["checkpoint_every"]
        return digest(parts)

    @property
    def rule_digest(self) -> str:
        """The same, whatever the number of steps, which a rule decides."""
        return self.with_steps(1, 0).digest


@dataclass(frozen=True)
class Trained:
    """What training made, and how long it took.

    Args:
        result: of the training.
        steps: outer steps.
        seconds: on the clock.
        processor_seconds: of all threads, which what else the machine does leaves alone.
    """

    result: TrainingResult
    steps: int
    seconds: float
    processor_seconds: float

    @property
    def told(self) -> dict[str, float]:
        """What a line says of it."""
        return {
            "training_steps": self.steps,
            "training_seconds": round(self.seconds, 1),
            "training_processor_seconds": round(self.processor_seconds, 1),
        }


class Trainer:
    """Trains on the classes of a fold, once for all that is scored with it.

    Args:
        folder: of all runs.
        cache: of frozen states, which are there before training begins, so that filling it takes nobody's time.
    """

    def __init__(self, folder: Path, cache: DiskCache) -> None:
        self.folder = folder
        self.cache = cache
        self._known: dict[tuple[Path, str], Trained] = {}

    def train(self, name: str, encoder: Encoder, recipe: RecipeSettings, train: Corpus, valid: Corpus) -> Trained:
        """Train a recipe, or go on with it, or return what it made; then calibrate it.

        Args:
            name: of the run, a path below the folder of all runs.
            encoder: with the recipe's LoRA.
            recipe: with its seed.
            train: training classes.
            valid: classes to choose the best step by.
        """
        folder = self.folder / f"{name}-{self._digest(encoder, recipe, train, valid)}"
        known = folder, recipe.digest
        if known not in self._known:
            self._known[known] = self._train(folder, encoder, recipe, train, valid)
        return self._known[known]

    def train_as_long(
        self, name: str, encoder: Encoder, recipe: RecipeSettings, train: Corpus, valid: Corpus, seconds: float
    ) -> Trained:
        """Train a recipe for so many seconds of processor time; its number of steps is chosen once, and kept.

        The steps are ⌊(seconds - 2 validations) / a step⌋, at least 1. Arguments else as for :meth:`train`.
        """
        folder = self.folder / f"{name}-{self._digest(encoder, recipe, train, valid)}"
        chosen = folder / "equal-time.json"
        if not chosen.exists():
            step, validation = self._calibrate(encoder, recipe, train, valid)
            steps = max(1, math.floor((seconds - 2 * validation) / step))
            told = {"steps": steps, "processor_seconds": seconds, "of_a_step": step, "of_a_validation": validation}
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(chosen, (json.dumps(told, indent=2) + "\n").encode())
        steps = json.loads(chosen.read_text())["steps"]
        return self.train(f"{name}-{steps}", encoder, recipe.with_steps(steps, recipe.training.seed, 2), train, valid)

    def _train(
        self, folder: Path, encoder: Encoder, recipe: RecipeSettings, train_on: Corpus, valid: Corpus
    ) -> Trained:
        for corpus in (train_on, valid):
            self.cache.warm(encoder, corpus)
        samplers = _samplers(recipe, train_on, valid)
        with _timed(folder):
            result = train(encoder, *samplers, recipe.training, recipe.inner, folder)
        if not (folder / TIMES).exists():  # all steps are of a run that was killed, and nobody knows what they took
            shutil.rmtree(folder)
            return self._train(folder, encoder, recipe, train_on, valid)
        result = calibrated(encoder, result, [valid], recipe.calibration, recipe.training.seed)
        save_adapter(folder, encoder, result.parameters, result.inner, result.record)
        times = json.loads((folder / TIMES).read_text())
        scale = recipe.training.steps / times["steps"]  # of a run that was killed, not all of the time was written down
        return Trained(result, recipe.training.steps, scale * times["seconds"], scale * times["processor_seconds"])

    def _calibrate(
        self, encoder: Encoder, recipe: RecipeSettings, train_on: Corpus, valid: Corpus
    ) -> tuple[float, float]:
        """Return the processor seconds of a step and of a validation."""
        for corpus in (train_on, valid):
            self.cache.warm(encoder, corpus)
        short = recipe.with_steps(CALIBRATION_STEPS, recipe.training.seed, 1)
        settings = replace(short.training, validation_episodes=1)
        samplers = _samplers(recipe, train_on, valid)
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            result = train(encoder, *samplers, settings, recipe.inner, Path(folder))
            step = (time.process_time() - start) / CALIBRATION_STEPS
        start = time.process_time()
        score_episodes(encoder, result.parameters, samplers[1].take(recipe.training.validation_episodes), result.inner)
        return step, time.process_time() - start

    @staticmethod
    def _digest(encoder: Encoder, recipe: RecipeSettings, *corpora: Corpus) -> str:
        encoder_settings = (encoder.weights_sha256, encoder.settings.pooling, encoder.settings.max_length)
        return digest([recipe.training_digest, encoder_settings, [corpus.sha256 for corpus in corpora]])[:8]


TIMES = "times.json"


@contextmanager
def _timed(folder: Path) -> Iterator[None]:
    """Add the time of what is inside, and the steps that it took, to the folder's ``times.json``."""
    first, start, processor = _step(folder), time.monotonic(), time.process_time()
    try:
        yield
    finally:
        steps = _step(folder) - first
        if steps:
            path = folder / TIMES
            times = (
                json.loads(path.read_text()) if path.exists() else {"seconds": 0, "processor_seconds": 0, "steps": 0}
            )
            times["seconds"] += time.monotonic() - start
            times["processor_seconds"] += time.process_time() - processor
            times["steps"] += steps
            write_atomically(path, (json.dumps(times, indent=2) + "\n").encode())


def _step(folder: Path) -> int:
    """Return the step of a run's checkpoint."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["state"])["step"])


def _samplers(recipe: RecipeSettings, train_on: Corpus, valid: Corpus) -> tuple[EpisodeSampler, EpisodeSampler]:
    seed = recipe.training.seed
    return EpisodeSampler(train_on, recipe.episodes, seed), EpisodeSampler(valid, recipe.episodes, seed + 1)


def read_recipe(path: Path) -> RecipeSettings:
    """Read a recipe from YAML."""
    return parse_settings(RecipeSettings, ["--config", str(path)])


def digest(content: Any) -> str:
    """Return a short hash of what JSON can hold."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
