"""What learning costs beside reading the texts, 16 tasks beside one by one, second order beside first.

    python benchmarks/core_speed.py --data-dir DATA

Sides alternate in one run; ratios are of medians. Texts are banking77's. Reading is what sentence-transformers' encode
takes, on as many threads; learning starts from token states. Memory is what a side adds to the process at its peak.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from contestants import KnownStates
from measure import Options, alternate, peak_of, print_table, resident, settle
from speed import sentence_encoder
from train_core import BASE

from textmeta.data.corpus import CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.encoder.encoder import Encoder
from textmeta.encoder.token_states import TokenStateReader
from textmeta.meta.adapter import Adapter
from textmeta.meta.algorithms import query_losses
from textmeta.meta.batch import TaskBatch
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner

TASKS, PARTS = 16, ("learn-25", "learn-770", "first-order", "second-order")


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
        known = KnownStates(self.reader, self.start.lora)
        known.know(batch.support.texts)
        states = known.read(batch.support.texts)
        known.read = lambda *_: states
        return torch.no_grad()(lambda: TaskLearner(known, self.adapter).learn(batch))

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
            return self.learning(self.episodes(*((5, 5) if part == "learn-25" else (77, 10)), 1))
        return self.outer(part == "second-order")


def main() -> None:
    """Print the tables."""
    parser = Options(__doc__, threads=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-of", choices=PARTS, help="print the peak of one part in this process, in KiB")
    arguments = parser.parsed()
    bench = Bench(arguments.data_dir)
    if arguments.memory_of:
        side = bench.side(arguments.memory_of)
        settle(bench.encoder._suffix)
        before = resident("VmRSS")
        side()
        print(max(0, resident("VmHWM") - before))
        return
    rows = [("what", "median s", "beside", "median s", "ratio")]

    def add(title: str, run: Callable[[], object], other: str, beside: Callable[[], object]) -> None:
        times = alternate({title: run, other: beside}, arguments.repeats, title)
        own, rival = median(times[title]), median(times[other])
        rows.append((title, f"{own:.3f}", other, f"{rival:.3f}", f"{own / rival:.2f}"))

    for ways, shots in ((5, 5), (77, 10)):
        (episode,) = bench.episodes(ways, shots, 1)
        texts = list(episode.support_texts)
        encode = partial(sentence_encoder("cpu").encode, texts)
        add(f"learn {ways} x {shots}", bench.learning([episode]), "encode", encode)
    many = bench.episodes(5, 5, TASKS)
    single = [bench.learning([e]) for e in many]
    add(f"{TASKS} tasks as one batch", bench.learning(many), "one by one", lambda: [run() for run in single])
    add("second order", bench.outer(True), "first order", bench.outer(False))
    print_table(rows)
    print()
    command = (__file__, "--data-dir", arguments.data_dir, "--threads", arguments.threads, "--memory-of")
    print_table([("part", "MiB"), *((part, peak_of(*command, part)) for part in PARTS)])


if __name__ == "__main__":
    main()
