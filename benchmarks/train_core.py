"""Meta-train an adapter on all training corpora: an arm of the ablation, or a run in search of a better default.

    python benchmarks/train_core.py --data-dir DATA --arm base --output runs/core/base-0

An arm is a row of ARMS, or of SEARCH. A run resumes where it was; its adapter is written into the output folder.
"""

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Options

from textmeta.errors import TrainingInterrupted
from textmeta.meta.initialisation import Initialisation
from textmeta.meta.trainer import MetaTrainer
from textmeta.sharing.store import load_adapter, save_adapter

sys.path.append(str(Path(__file__).parents[1] / "recipes"))  # the corpora and settings of the shipped adapter
from general import GENERAL, training_corpora

BASE = replace(GENERAL, episodes=1600)
# all tensors that have no part in names
NOT_OF_NAMES = tuple(f.name for f in fields(Initialisation) if "name" not in f.name and f.name != "log_zero_shot_scale")


def _learner(episodes: int = BASE.episodes, *, fixed: tuple[str, ...] = (), **changes: Any) -> MetaTrainer:
    return replace(BASE, learner=replace(BASE.learner, **changes), episodes=episodes, fixed=fixed)


# All arms take as long as the base arm: numbers of episodes are by time measured on equal episodes.
ARMS: dict[str, MetaTrainer] = {
    "last-layer": _learner(fixed=("lora.",), layers=(6,), adapt="none"),
    "views": _learner(fixed=("lora.",), adapt="none"),
    "views-steps": _learner(fixed=("lora.",)),
    "base": BASE,
    "views-lora": _learner(adapt="none"),
    "layers-6": _learner(layers=(6,)),
    "layers-3-to-6": _learner(layers=(3, 4, 5, 6)),
    "layers-2-4-6": _learner(layers=(2, 4, 6)),
    "layers-0-to-6": _learner(layers=(0, 1, 2, 3, 4, 5, 6)),
    "steps-3": _learner(steps=3),
    "steps-12": _learner(steps=12),
    "fomaml": replace(BASE, algorithm="fomaml"),
    "reptile": replace(BASE, algorithm="reptile"),
    "meta-sgd": replace(BASE, algorithm="meta_sgd"),
    "protonet": replace(BASE, algorithm="protonet"),
    "anil": replace(BASE, algorithm="anil"),
    "no-centre": replace(BASE, fixed=("centre", "log_centre_strength")),
    "corpora-5": BASE,
    "corpora-20": BASE,
    "no-names": replace(BASE, names=0.0),
    "names-after": replace(BASE, episodes=200, fixed=NOT_OF_NAMES),  # the names' own numbers, once all else is learned
}
TWO_VIEWS = replace(GENERAL, episodes=3000)
SEARCH = {  # runs in search of a better default
    "full-2000": _learner(2000, layers=(3, 4, 5, 6)),
    "two-views-3000": TWO_VIEWS,
    "two-views-6600": replace(TWO_VIEWS, episodes=6600),
    "slow-lora": replace(TWO_VIEWS, lora_rate=2e-4),
    "six-layers": replace(TWO_VIEWS, lora=replace(GENERAL.lora, layers=6), episodes=1500),
    "four-tasks": replace(TWO_VIEWS, tasks_per_step=4),
}
STARTS: dict[str, Mapping[str, torch.Tensor]] = {"no-centre": {"log_centre_strength": torch.tensor(-30.0)}}
AFTER = {"names-after": "no-names"}  # the arm whose adapter another starts from
CORPORA = {"corpora-5": 5, "corpora-20": 20}  # how many corpora an arm is trained on, drawn by its seed, if not all


def main() -> None:
    """Train an arm."""
    parser = Options(__doc__)
    parser.add_argument("--arm", choices=(*ARMS, *SEARCH), default="base")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/frozen"), help="states of the frozen layers: about 3 GB"
    )
    parser.add_argument("--start", type=Path, help="adapter of the arm that this one comes after")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parsed()
    if arguments.arm in AFTER and not arguments.start:
        parser.error(f"{arguments.arm} needs --start, the adapter of {AFTER[arguments.arm]}")
    trainer = replace((ARMS | SEARCH)[arguments.arm], seed=arguments.seed)
    start = load_adapter(arguments.start)[0] if arguments.arm in AFTER else STARTS.get(arguments.arm)
    corpora = training_corpora(arguments.data_dir)
    order = np.random.default_rng(arguments.seed).permutation(len(corpora))[: CORPORA.get(arguments.arm, len(corpora))]
    corpora = [corpora[number] for number in sorted(order)]
    try:
        adapter = trainer.train(corpora, output=arguments.output, start=start, cache=arguments.cache)
    except TrainingInterrupted as stop:
        sys.exit(str(stop))
    save_adapter(arguments.output, adapter)


if __name__ == "__main__":
    main()
