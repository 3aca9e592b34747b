"""Meta-train the core on all training corpora: the first adapter, and the arms of the ablation.

    python benchmarks/train_core.py --data-dir DATA --arm first --output runs/core/first

An arm is a row of ARMS. A run resumes where it was; its adapter is written into the output folder.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm import tqdm

from textmeta.data.bundled import load_bundled
from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import TrainingInterrupted
from textmeta.meta.adapter import CoreAdapter
from textmeta.meta.initialisation import LearnerSettings
from textmeta.meta.learner import TaskLearner
from textmeta.meta.scope_rule import fit_scope_rule
from textmeta.meta.trainer import MetaTrainer, OuterSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings

FIRST_COLLECTION = ("banking77", "clinc150", "stackoverflow", "snips", "dbpedia14")  # may be trained on
ROWS = 80  # of a class, as the second collection has them
ENCODER = EncoderSettings(max_length=256)
LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
LORA = LoraSettings(layers=3, rank=8, alpha=16, targets=LINEAR)
SCOPE_EPISODES, FIRST_UNSEEN = 400, 10**6
EPISODES, TUNING_EPISODES, ARM_EPISODES = 6000, 600, 1000  # of the first adapter, its second run, an arm
# beginnings of the names of all tensors that have no part in names
NOT_OF_NAMES = (
    "lora",
    "queries",
    "log_step",
    "pull",
    "step_gate",
    "loss",
    "centre",
    "log_centre",
    "log_penalty",
    "view_prior",
    "log_evidence",
    "temperature",
    "log_unlabelled",
    "unlabelled",
)


@dataclass(frozen=True)
class Arm:
    """What an arm of the ablation changes.

    Args:
        learner: how tasks are learned.
        outer: of the outer loop.
        lora: of the adapter.
        shares: keyword arguments of the episodes.
        start: numbers that it starts from, all entries of a tensor alike.
        after: the arm whose adapter it starts from.
        lora_share: what that adapter's LoRA is multiplied by: halfway back to the frozen encoder, an adapter does better
            on corpora that it has not seen (Wortsman et al., 2022, "Robust fine-tuning of zero-shot models").
    """

    learner: LearnerSettings = field(default_factory=LearnerSettings)
    outer: OuterSettings = field(default_factory=lambda: OuterSettings(episodes=ARM_EPISODES))
    lora: LoraSettings = LORA
    shares: Mapping[str, float] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)
    after: str | None = None
    lora_share: float = 1.0


def _arm(learner: Mapping[str, Any] = {}, outer: Mapping[str, Any] = {}, **others: Any) -> Arm:
    return Arm(LearnerSettings(**learner), OuterSettings(**{"episodes": ARM_EPISODES, **outer}), **others)


# All arms take as long as 1,000 episodes of the base arm: numbers of episodes are by time measured on equal episodes.
ARMS: dict[str, Arm] = {
    "first": _arm(outer={"episodes": EPISODES}),
    # all other numbers, once LoRA is halved
    "tuned": _arm(outer={"episodes": TUNING_EPISODES, "fixed": ("lora.", "queries")}, after="first", lora_share=0.5),
    "base": _arm(),
    "layers-6": _arm({"layers": (6,)}),
    "layers-3-6": _arm({"layers": (3, 6)}),
    "layers-2-4-6": _arm({"layers": (2, 4, 6)}),
    "layers-0-6": _arm({"layers": (0, 1, 2, 3, 4, 5, 6)}, {"episodes": 740}),
    "steps-0": _arm({"adapt": "none"}, {"episodes": 1290}),
    "steps-3": _arm({"steps": 3}, {"episodes": 1110}),
    "steps-12": _arm({"steps": 12}, {"episodes": 720}),
    "evidence-after": _arm({"evidence": "after"}),
    "no-lora": _arm(outer={"fixed": ("lora.",), "episodes": 2000}),
    "fomaml": _arm(outer={"algorithm": "fomaml", "episodes": 1060}),
    "reptile": _arm(outer={"algorithm": "reptile", "episodes": 780}),
    "meta-sgd": _arm(outer={"algorithm": "meta_sgd", "episodes": 910}),
    "protonet": _arm(outer={"algorithm": "protonet", "episodes": 1290}),
    "no-centre": _arm(outer={"fixed": ("centre", "log_centre_strength")}, start={"log_centre_strength": -30.0}),
    "no-names": _arm(shares={"names": 0.0}),
    # the names' own numbers alone, learned once all else is
    "names-after": _arm(outer={"episodes": 200, "fixed": NOT_OF_NAMES}, after="no-names"),
}


def training_corpora(data_dir: Path) -> list[Corpus]:
    """Load the 82 corpora that may be trained on, at most 80 rows a class."""
    paths = sorted((data_dir / "train").glob("*.jsonl")) + [data_dir / f"{name}.jsonl" for name in FIRST_COLLECTION]
    loaded = [load_corpus(CorpusSettings(str(path))).thinned(ROWS, seed=0) for path in paths]
    return [*loaded, load_bundled()[0]]


def with_outside(episodes: MixedEpisodes) -> Iterator[Episode]:
    """Yield episodes that training has not seen and that have queries of other classes."""
    unseen = (episodes[number] for number in itertools.count(FIRST_UNSEEN))
    return itertools.islice((e for e in unseen if (e.query_labels == OUTSIDE).any()), SCOPE_EPISODES)


def main() -> None:
    """Train an arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--arm", choices=ARMS, default="first")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/frozen"), help="states of the frozen layers: about 3 GB"
    )
    parser.add_argument("--start", type=Path, help="adapter of the arm that this one comes after")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    datasets.disable_progress_bars()
    arm = ARMS[arguments.arm]
    corpora = training_corpora(arguments.data_dir)
    encoder = Encoder(ENCODER, arm.lora, precision="bf16")
    reader = TokenStateReader(encoder, arm.learner.layers)
    for corpus in tqdm(corpora, desc="frozen layers", unit="corpus"):
        reader.cache(corpus.texts, arguments.cache)
    trainer = MetaTrainer(reader, arm.learner, replace(arm.outer, seed=arguments.seed))
    told = {"arm": arguments.arm, "corpora": [corpus.summary for corpus in corpora]}
    start = {} if arm.after is None else CoreAdapter.load(arguments.start)[0].initialisation.tensors()
    start |= {name: value * arm.lora_share for name, value in start.items() if ".lora_B." in name}
    start |= {name: torch.full(trainer.shape.tensors()[name].shape, value) for name, value in arm.start.items()}
    episodes = MixedEpisodes(corpora, arguments.seed, **arm.shares)
    try:
        initialisation = trainer.train(episodes, arguments.output, told, start)
    except TrainingInterrupted as stop:
        sys.exit(str(stop))
    learner = TaskLearner(reader, initialisation, trainer.learner)
    rule = fit_scope_rule(learner, tqdm(with_outside(episodes), "scope rule", SCOPE_EPISODES, unit="episode"))
    record = {**told, "episodes": arm.outer.episodes, "seed": arguments.seed}
    CoreAdapter(ENCODER, encoder.weights_sha256, arm.lora, trainer.learner, initialisation, rule, record).save(
        arguments.output
    )


if __name__ == "__main__":
    main()
