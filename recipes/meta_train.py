"""Meta-train a LoRA initialisation on the training classes of a corpus; report it on the test classes.

python recipes/meta_train.py --config recipes/configs/banking77_fomaml.yaml --output runs/banking77 \
    --data banking77.jsonl --splits recipes/splits/banking77.splits.json --fold 01 --training.steps 200

Every setting can be given in the YAML file or on the command line (--help lists them). Interrupted, the same command
goes on from the last checkpoint in the output folder.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from textmeta.artifact.saving import check_destination
from textmeta.artifact.start import load_start
from textmeta.artifact.store import save_adapter
from textmeta.cli import run_recipe
from textmeta.data.class_splits import load_parts
from textmeta.data.corpus import CorpusSettings
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.errors import SettingsError
from textmeta.meta.calibration import CalibrationSettings, calibrated
from textmeta.meta.evaluation import compare_with_frozen, format_table
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.training import train
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings
from textmeta.tasks import index_tasks


@dataclass(frozen=True)
class MetaTrainSettings:
    """Settings of this recipe.

    Args:
        output: folder of the run: checkpoint, record, adapter and results.
        corpora: what to train on, each with its own class split.
        data: local file, with columns text and label, to use instead of the corpora.
        splits: JSON file with class splits, instead of the corpora's own.
        fold: which of the splits in the file, instead of the corpora's own.
        test_ways: classes of a test episode.
        test_shots: shots of the test episodes; each number makes a row of the table.
        test_episodes: test episodes of each row.
        start: adapter to start from: a folder, an adapter shipped with textmeta or an id on the Hub, of textmeta or of
            PEFT (plain LoRA); its LoRA settings are used.
        start_revision: branch, tag or commit of a start on the Hub.
        index_rows: texts of each training class that go into the index of training tasks, which a task encoder has; the
            names of the classes are stored with it. 0 for no index.
        calibration: on the validation classes, after training (of inner loops without steps); null for none.
        precision: bf16 for bfloat16 matrix products; by default what `accelerate launch` says.
        encoder: the encoder.
        lora: the LoRA on its upper layers.
        episodes: what training and validation episodes look like.
        inner: the inner loop.
        training: the outer loop.
    """

    output: Path
    corpora: list[CorpusSettings] = field(default_factory=list)
    data: str | None = None
    splits: str | None = None
    fold: str | None = None
    test_ways: int = 5
    test_shots: list[int] = field(default_factory=lambda: [1, 5])
    test_episodes: int = 600
    start: str | None = None
    start_revision: str | None = None
    index_rows: int = 20
    calibration: CalibrationSettings | None = None
    precision: Literal["no", "bf16"] | None = None
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    episodes: EpisodeSettings = field(default_factory=EpisodeSettings)
    inner: InnerLoopSettings = field(default_factory=InnerLoopSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        """Check what would otherwise fail only after training."""
        if self.test_episodes < 2:
            raise SettingsError(f"test_episodes must be at least 2, given {self.test_episodes}")
        if self.index_rows < 0:
            raise SettingsError(f"index_rows must not be negative, given {self.index_rows}")
        check_destination(self.output)

    def sources(self) -> list[CorpusSettings]:
        """Return the corpora with what the command line says of them."""
        if not self.corpora and not self.data:
            raise SettingsError("nothing to train on: give --data FILE, or corpora in the config")
        chosen = {k: v for k, v in (("splits", self.splits), ("fold", self.fold)) if v is not None}
        if self.data:
            first = self.corpora[0] if len(self.corpora) == 1 else CorpusSettings(self.data)
            return [CorpusSettings(self.data, **{"splits": first.splits, "fold": first.fold, **chosen})]
        return [replace(corpus, **chosen) for corpus in self.corpora]


def main(settings: MetaTrainSettings) -> None:
    """Train, save the adapter, evaluate on unseen classes, print and save the results."""
    seed = settings.training.seed
    accelerator = Accelerator(mixed_precision=settings.precision)
    parts = load_parts(settings.sources())
    train_episodes = EpisodeSampler(parts["train"], settings.episodes, seed)
    valid_episodes = EpisodeSampler(parts["valid"], settings.episodes, seed + 1)
    test_episodes = {
        f"{settings.test_ways}-way {shots}-shot": EpisodeSampler(
            parts["test"], EpisodeSettings(settings.test_ways, shots, 5), seed + 2
        )
        for shots in settings.test_shots
    }

    start = load_start(settings.start, revision=settings.start_revision) if settings.start else None
    lora = start.lora if start else settings.lora
    encoder = Encoder(settings.encoder, lora, accelerator.device, accelerator.mixed_precision)
    result = train(
        encoder, train_episodes, valid_episodes, settings.training, settings.inner, settings.output, accelerator,
        start.fitted_to(encoder) if start else None,
    )  # fmt: skip
    if accelerator.is_main_process:
        result = calibrated(encoder, result, parts["valid"], settings.calibration, seed)
        results: dict[str, dict] = {}
        tested_on = [{**corpus.summary, "source": dict(corpus.source)} for corpus in parts["test"]]
        record = {**result.record, "test": {"corpora": tested_on}, **({"start": start.told} if start else {})}
        known = None
        if result.inner.conditioning is not None:
            record["index_rows"] = rows = settings.index_rows
            known = index_tasks(encoder, parts["train"], rows=rows) if rows else None
        save_adapter(settings.output, encoder, result.parameters, result.inner, record, known_tasks=known)
        for name, sampler in test_episodes.items():
            episodes = sampler.take(settings.test_episodes)
            results[name] = compare_with_frozen(encoder, result.parameters, episodes, result.inner, name)
        record["results"] = results
        save_adapter(settings.output, encoder, result.parameters, result.inner, record, known_tasks=known)
        (settings.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(format_table(results))
    accelerator.end_training()


if __name__ == "__main__":
    run_recipe(main, MetaTrainSettings, __doc__)
