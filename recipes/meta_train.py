"""Meta-train a LoRA initialisation on the training classes of a corpus; report it on the test classes.

python recipes/meta_train.py --config recipes/configs/banking77_fomaml.yaml --output runs/banking77
python recipes/meta_train.py --config recipes/configs/banking77_fomaml.yaml --output runs/banking77 \
    --data banking77.jsonl --splits recipes/splits/banking77.splits.json --fold 01 --training.steps 200

Every setting can be given in the YAML file or on the command line (--help lists them). Interrupted, the same command
goes on from the last checkpoint in the output folder.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from textmeta.artifact.store import save_adapter
from textmeta.cli import parse_settings
from textmeta.data.class_splits import draw_class_split, read_class_split
from textmeta.data.corpus import CorpusSettings, load_corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.errors import SettingsError, TextMetaError
from textmeta.meta.adaptation import InnerLoopSettings
from textmeta.meta.evaluation import compare_with_frozen, format_table
from textmeta.meta.training import TrainingSettings, train
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings


@dataclass(frozen=True)
class MetaTrainSettings:
    """Settings of this recipe.

    Args:
        output: folder of the run: checkpoint, record, adapter and results.
        corpora: what to train on; each with its own class split.
        data: local file to use instead of the corpora.
        splits: JSON file with the class split of each corpus; without one, it is drawn by the training seed.
        fold: which of the splits in the file.
        test_shots: shots of the test episodes; each number makes a row of the table.
        test_episodes: test episodes of each row.
        precision: bf16 for bfloat16 matrix products; by default what `accelerate launch` says.
        cpu: use the CPU even where there is a GPU.
        encoder: the encoder.
        lora: the LoRA on its upper layers.
        episodes: what training and validation episodes look like.
        inner: the inner loop.
        training: the outer loop.
    """

    output: Path
    corpora: list[CorpusSettings] = field(default_factory=list)
    data: str | None = None
    splits: Path | None = None
    fold: str | None = None
    test_shots: list[int] = field(default_factory=lambda: [1, 5])
    test_episodes: int = 600
    precision: Literal["no", "bf16"] | None = None
    cpu: bool = False
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    episodes: EpisodeSettings = field(default_factory=EpisodeSettings)
    inner: InnerLoopSettings = field(default_factory=InnerLoopSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


def main(settings: MetaTrainSettings) -> None:
    """Train, save the adapter, evaluate on unseen classes, print and save the results."""
    sources = [CorpusSettings(settings.data)] if settings.data else settings.corpora
    if not sources:
        raise SettingsError("nothing to train on: give --data FILE, or corpora in the config")
    seed = settings.training.seed
    accelerator = Accelerator(mixed_precision=settings.precision, cpu=settings.cpu)
    parts: dict[str, list] = {"train": [], "valid": [], "test": []}
    for corpus in map(load_corpus, sources):
        split = (
            read_class_split(settings.splits, settings.fold)
            if settings.splits
            else draw_class_split(corpus.class_names, seed)
        )
        for part, corpora in parts.items():
            corpora.append(corpus.restrict(getattr(split, part)))

    encoder = Encoder(settings.encoder, settings.lora, accelerator.device, accelerator.mixed_precision)
    train_episodes = EpisodeSampler(parts["train"], settings.episodes, seed)
    valid_episodes = EpisodeSampler(parts["valid"], settings.episodes, seed + 1)
    result = train(
        encoder, train_episodes, valid_episodes, settings.training, settings.inner, settings.output, accelerator
    )
    if accelerator.is_main_process:
        results = {}
        for shots in settings.test_shots:
            test = EpisodeSampler(parts["test"], EpisodeSettings(5, shots, 5, at_most=True), seed + 2)
            name = f"5-way {shots}-shot"
            results[name] = compare_with_frozen(
                encoder, result.parameters, test.take(settings.test_episodes), result.inner, name
            )
        save_adapter(settings.output, encoder, result.parameters, result.inner, {**result.record, "results": results})
        (settings.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(format_table(results))
    accelerator.end_training()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(parse_settings(MetaTrainSettings, description=__doc__))
    except TextMetaError as error:
        sys.exit(f"{type(error).__name__}: {error}")
