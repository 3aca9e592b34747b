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

from textmeta.artifact.locate import load_from
from textmeta.artifact.saving import check_destination
from textmeta.artifact.store import save_adapter
from textmeta.cli import run_recipe
from textmeta.data.bundled import load_bundled
from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.errors import SettingsError
from textmeta.meta.calibration import (
    CALIBRATED,
    CalibrationSettings,
    as_used,
    calibrate,
    calibration_episodes,
    recalibrate,
)
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.task_measures import measure_adapted_tasks, measure_tasks
from textmeta.meta.training import TrainingResult, train
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import Parameters
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
        calibrated_as: adapter whose calibration is taken over, instead of training without each corpus.
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
    calibrated_as: str | None = None

    def __post_init__(self) -> None:
        """Check what would otherwise fail only after training."""
        check_destination(self.output)


def main(settings: GeneralSettings) -> None:
    """Train without each corpus and measure on it, train on all, calibrate, save."""
    torch.set_num_threads(settings.threads)
    everything = load_corpora(settings)
    encoder = Encoder(settings.encoder, settings.lora)
    if settings.calibrated_as:
        other, _ = load_from(settings.calibrated_as)
        used = settings.calibration.inner or settings.inner
        if other.inner != used:
            raise SettingsError(f"{settings.calibrated_as} is calibrated for {other.inner}, expected {used}")
        numbers = chosen(other.parameters)
    else:
        numbers = calibrate_by_leaving_out(settings, encoder, everything)
    result = meta_train(settings, encoder, everything, "all")
    parameters, inner = as_used(result.parameters, result.inner, settings.calibration)
    record = {**result.record, "calibration": {**asdict(settings.calibration), "corpora": "each left out in turn"}}
    save_adapter(settings.output, encoder, {**parameters, **numbers}, inner, record)
    print(settings.output)


def calibrate_by_leaving_out(settings: GeneralSettings, encoder: Encoder, everything: list[Corpus]) -> Parameters:
    """Return what calibration sets, on what adapters that were trained without a corpus make of it."""
    seed, adapters, measures = settings.training.seed, [], []
    for left_out in tqdm(everything, desc="corpora left out", unit="corpus"):
        others = [corpus for corpus in everything if corpus is not left_out]
        result = meta_train(settings, encoder, others, f"without-{left_out.name}")
        adapters.append(as_used(result.parameters, result.inner, settings.calibration))
        tasks = calibration_episodes(left_out, settings.calibration, seed)
        measures += measure_tasks(encoder, *adapters[-1], tasks, f"measuring {left_out.name}")
    numbers = chosen(calibrate(adapters[0][0], measures))
    if not adapters[0][1].steps:
        return numbers
    measures = []
    for (parameters, inner), left_out in zip(adapters, everything, strict=True):
        tasks = calibration_episodes(left_out, settings.calibration.adapted, seed)
        adapter = {**parameters, **numbers}, inner
        measures += measure_adapted_tasks(encoder, *adapter, tasks, f"measuring {left_out.name} after the inner steps")
    return chosen(recalibrate({**adapters[0][0], **numbers}, measures))


def chosen(parameters: Parameters) -> Parameters:
    """Return the parameters that calibration has set."""
    return {name: parameters[name] for name in CALIBRATED if name in parameters}


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
