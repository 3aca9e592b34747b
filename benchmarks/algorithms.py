"""All algorithms at equal training time: how long each config trains, and what its run reached.

for name in protonet anil fomaml maml meta_sgd reptile ridge; do
    python recipes/meta_train.py --config recipes/configs/banking77_$name.yaml --data banking77.jsonl \
        --splits recipes/splits/banking77.splits.json --fold 01 --output runs/$name
done
python benchmarks/algorithms.py --data banking77.jsonl --runs runs

Times are of outer steps alone, on cached texts: the sides alternate, medians, times the config's number of steps.
"""

import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from measure import print_table, timed
from tqdm import tqdm

from textmeta.cli import run_recipe
from textmeta.data.class_splits import read_class_split
from textmeta.data.corpus import CorpusSettings, load_corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.algorithms import ALGORITHMS, Algorithm
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.model.encoder import Encoder, EncoderSettings

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"


@dataclass(frozen=True)
class AlgorithmsSettings:
    """Settings of this benchmark.

    Args:
        data: local file with the corpus banking77.
        runs: folder with the outputs of the runs, each named as its config ends.
        splits: file of class splits.
        fold: of the splits.
        repeats: timings of each config.
        timed_steps: outer steps of a timing, spread over the run.
    """

    data: str
    runs: Path
    splits: str = "recipes/splits/banking77.splits.json"
    fold: str = "01"
    repeats: int = 5
    timed_steps: int = 2


def main(settings: AlgorithmsSettings) -> None:
    """Time every config, read its run, print the table."""
    configs = {path.stem.removeprefix("banking77_"): path for path in sorted(CONFIGS.glob("banking77_*.yaml"))}
    content = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in configs.items()}
    seconds = training_seconds(settings, content)
    rows = [("config", "steps", "training, s", "validation", "1 shot", "over frozen", "5 shots", "over frozen", "NLL")]
    rows += [
        (name, str(config["training"]["steps"]), f"{seconds[name]:.0f}", *outcome(settings.runs / name))
        for name, config in content.items()
    ]
    print_table(rows)


def training_seconds(settings: AlgorithmsSettings, content: dict[str, Any]) -> dict[str, float]:
    """Return what the outer steps of each config take."""
    corpus = load_corpus(CorpusSettings(settings.data))
    corpus = corpus.restrict(read_class_split(settings.splits, settings.fold).train)
    encoder = Encoder(EncoderSettings(max_length=64))
    encoder.prepare(list(corpus.texts))
    times: dict[str, list[float]] = {name: [] for name in content}
    for repeat in tqdm(range(settings.repeats), desc="timing", leave=False):
        for name, config in content.items():
            training, episodes = config["training"], config["episodes"]
            ranges = {key: tuple(value) if isinstance(value, list) else value for key, value in episodes.items()}
            sampler = EpisodeSampler(corpus, EpisodeSettings(**ranges), seed=0)
            algorithm = ALGORITHMS[training["algorithm"]]
            inner = algorithm.inner(InnerLoopSettings(**config["inner"]))
            plan = MetaGradientSettings(**training.get("meta_gradient", {}))
            steps, tasks = training["steps"], training["tasks_per_step"]
            starts = [part * steps // settings.timed_steps + repeat for part in range(settings.timed_steps)]
            run = partial(outer_steps, encoder, algorithm, inner, sampler, tasks, starts, plan)
            times[name].append(timed(run, encoder) / settings.timed_steps * steps)
    return {name: statistics.median(values) for name, values in times.items()}


def outer_steps(
    encoder: Encoder,
    algorithm: Algorithm,
    inner: InnerLoopSettings,
    sampler: EpisodeSampler,
    tasks: int,
    starts: list[int],
    plan: MetaGradientSettings,
) -> None:
    """Take the meta-gradients of some outer steps, by number, at the start of training."""
    parameters = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    for step in starts:
        episodes = [sampler[step * tasks + task] for task in range(tasks)]
        algorithm.gradient(encoder, parameters, episodes, inner, plan)


def outcome(run: Path) -> tuple[str, ...]:
    """Return the cells of a run: validation accuracy, and accuracy on the test classes at 1 and 5 shots."""
    if not (run / "results.json").exists():
        return ("not run", *("",) * 5)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    record = json.loads((run / "textmeta.json").read_text(encoding="utf-8"))["record"]
    cells = [f"{100 * record['valid_accuracy']:.2f}"]
    for shots in (1, 5):
        row = results[f"5-way {shots}-shot"]
        trained, paired = row["meta_trained"], row["paired"]
        cells.append(f"{100 * trained['accuracy']:.2f} ± {100 * trained['accuracy_ci95']:.2f}")
        cells.append(f"{100 * paired['difference']:+.2f} [{100 * paired['low']:+.2f}, {100 * paired['high']:+.2f}]")
    cells.append(" / ".join(f"{results[f'5-way {shots}-shot']['meta_trained']['nll']:.3f}" for shots in (1, 5)))
    return tuple(cells)


if __name__ == "__main__":
    run_recipe(main, AlgorithmsSettings, __doc__)
