"""Make the adapter that comes with textmeta: meta-train it on 82 corpora.

    python recipes/general.py --data-dir DATA --output OUT

DATA holds the corpora that ``corpora.csv`` names, beside this file, as NAME.jsonl or train/NAME.jsonl. The same command
goes on with a run that was stopped; on the same kind of machine, with as many threads, it writes the same bytes.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from textmeta import CorpusSettings, MetaTrainer, TextMetaError, load_corpus
from textmeta.data.bundled import load_bundled
from textmeta.data.corpus import Corpus
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.meta.adapter import Adapter
from textmeta.meta.calibration import episodes_with_outside, fit_calibration
from textmeta.meta.initialisation import LearnerSettings
from textmeta.meta.learner import TaskLearner
from textmeta.nearest import index_corpora
from textmeta.sharing.folder import check_destination
from textmeta.sharing.store import save_adapter

CORPORA = Path(__file__).with_name("corpora.csv")
ROWS = 80  # of a class, at most
GENERAL = MetaTrainer(
    encoder=EncoderSettings(max_length=256),
    lora=LoraSettings(
        layers=3,
        rank=8,
        alpha=16,
        targets=("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    ),
    learner=LearnerSettings(layers=(3, 6)),
    episodes=3000,
    precision="bf16",
)
LEFT_OUT_EPISODES = 1000  # of the run without them
CALIBRATION_EPISODES = 400


def listed() -> list[dict[str, str]]:
    """Return the rows of the list of corpora."""
    with CORPORA.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def training_corpora(data_dir: Path) -> list[Corpus]:
    """Load the corpora, at most 80 rows a class, the bundled one last."""
    found = []
    for row in listed():
        name = f"{row['corpus']}.jsonl"
        path = data_dir / "train" / name if (data_dir / "train" / name).exists() else data_dir / name
        found.append(thinned(load_corpus(CorpusSettings(str(path), license=row["licence"])), ROWS))
    return [*found, load_bundled()[0]]


def thinned(corpus: Corpus, rows: int) -> Corpus:
    """Return a corpus with at most so many rows of each class, drawn at random."""
    rng = np.random.default_rng(0)
    kept = [rng.permutation(corpus.rows_of(number))[:rows] for number in range(len(corpus.class_names))]
    order = np.sort(np.concatenate(kept))
    return replace(corpus, texts=[corpus.texts[row] for row in order], labels=corpus.labels[order])


def make(corpora: list[Corpus], trainer: MetaTrainer, output: Path, cache: Path | None = None) -> Adapter:
    """Train the adapter, and another one without ten of the corpora: on these it sets the rule for what is no class."""
    adapter = trainer.train(corpora, output=output, cache=cache)
    left_out = [row["corpus"] for row in listed() if row["left_out"]]
    seen, unseen = ([corpus for corpus in corpora if (corpus.name in left_out) == out] for out in (False, True))
    beside = output.with_name(f"{output.name}-left-out")  # for its checkpoint
    shorter = replace(trainer, episodes=LEFT_OUT_EPISODES).train(seen, output=beside, cache=cache)
    reader = adapter.load_reader()
    episodes = episodes_with_outside(MixedEpisodes(unseen, trainer.seed, names=trainer.names), CALIBRATION_EPISODES)
    scope = fit_calibration(TaskLearner(reader, shorter), episodes)
    index = index_corpora(TaskLearner(reader, adapter), corpora)
    return replace(adapter, scope=scope, index=index)


def main() -> None:
    """Make it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder for the states of the frozen layers, 3 GB; else in memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        check_destination(arguments.output)  # before what takes long
        corpora = training_corpora(arguments.data_dir)
        adapter = make(corpora, replace(GENERAL, seed=arguments.seed), arguments.output, arguments.cache)
        if PartialState().is_main_process:
            save_adapter(arguments.output, adapter)
    except TextMetaError as error:
        sys.exit(str(error))
    print(f"The adapter is in {arguments.output}.")


if __name__ == "__main__":
    main()
