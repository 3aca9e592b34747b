"""Make the adapter that comes with textmeta: meta-train on several corpora, calibrate on each left out in turn.

python recipes/minilm_general.py --config recipes/configs/general/minilm_general.yaml \
    --data-dir DIR --output runs/general

DIR holds NAME.jsonl (`text`, `label`) of the corpora; the corpus that comes with textmeta joins them. Temperature,
prior of the strengths and out-of-scope rule have to be right for corpora that were never seen, so they are fitted on
what adapters trained without a corpus make of it. Interrupted, the same command goes on; on one machine it ends in the
same adapter, byte for byte.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from textmeta.artifact.saving import check_destination
from textmeta.artifact.store import save_adapter
from textmeta.cli import run_recipe
from textmeta.data.bundled import load_bundled
from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.meta.calibration import CalibrationSettings, calibrate, calibration_episodes, measure_tasks, with_head
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.training import TrainingResult, TrainingSettings, train
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings


@dataclass(frozen=True)
class GeneralSettings:
    """Settings of this recipe.

    Args:
        data_dir: folder with NAME.jsonl of the corpora.
        output: folder for the adapter.
        runs: folder for checkpoints of all trainings; by default beside the output.
        corpora: name of each corpus, and the licence of its texts.
        rows: texts of a class that are used, the first ones after a shuffle.
        threads: of the processor; another number rounds differently.
        encoder: the encoder.
        lora: the LoRA on its upper layers.
        episodes: what training episodes look like.
        inner: the inner loop.
        training: the outer loop.
        calibration: on the corpus that is left out.
    """

    data_dir: Path
    output: Path
    runs: Path | None = None
    corpora: dict[str, str] = field(default_factory=dict)
    rows: int = 60
    threads: int = 1
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    episodes: EpisodeSettings = field(default_factory=EpisodeSettings)
    inner: InnerLoopSettings = field(default_factory=InnerLoopSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)

    def __post_init__(self) -> None:
        """Check what would otherwise fail only after training."""
        check_destination(self.output)


def main(settings: GeneralSettings) -> None:
    """Train without each corpus and measure on it, train on all, calibrate, save."""
    torch.set_num_threads(settings.threads)
    seed = settings.training.seed
    everything = load_corpora(settings)
    encoder = Encoder(settings.encoder, settings.lora)
    measures = []
    for left_out in tqdm(everything, desc="corpora left out", unit="corpus"):
        others = [corpus for corpus in everything if corpus is not left_out]
        result = meta_train(settings, encoder, others, f"without-{left_out.name}")
        tasks = calibration_episodes(left_out, settings.calibration, seed)
        adapter = with_head(result.parameters, result.inner, settings.calibration.head)
        measures += measure_tasks(encoder, *adapter, tasks, f"measuring {left_out.name}")
    result = meta_train(settings, encoder, everything, "all")
    parameters, inner = with_head(result.parameters, result.inner, settings.calibration.head)
    record = {**result.record, "calibration": {**asdict(settings.calibration), "corpora": "each left out in turn"}}
    save_adapter(settings.output, encoder, calibrate(parameters, measures), inner, record)
    print(settings.output)


def load_corpora(settings: GeneralSettings) -> list[Corpus]:
    """Return the corpora, thinned, and the one that comes with textmeta."""
    found = [
        load_corpus(CorpusSettings(str(settings.data_dir / f"{name}.jsonl"), license=licence))
        for name, licence in settings.corpora.items()
    ]
    return [corpus.thinned(settings.rows, seed=0) for corpus in (*found, load_bundled()[0])]


def meta_train(settings: GeneralSettings, encoder: Encoder, corpora: list[Corpus], name: str) -> TrainingResult:
    """Train on some corpora, or go on with it."""
    folder = (settings.runs or settings.output.with_name(settings.output.name + "-runs")) / name
    seed = settings.training.seed
    samplers = [EpisodeSampler(corpora, settings.episodes, seed + number) for number in (0, 1)]
    return train(encoder, *samplers, settings.training, settings.inner, folder)


if __name__ == "__main__":
    run_recipe(main, GeneralSettings, __doc__)
