"""What each part of the core is worth: arms of 15 minutes of training each, all else alike.

    python benchmarks/ablation.py                          # the table, from recorded episodes
    python benchmarks/ablation.py --data-dir DATA --run    # trains and judges what is missing, one arm after another
    python benchmarks/ablation.py --data-dir DATA --train full-2000 --folder runs/search   # goes on where it was

--train also makes the runs in search of a better default, SEARCH, into a folder of their name, for choose.py.

It is judged on the seven corpora of the headline (accuracy.py), or with --choose on the 25 that designs are chosen by.
Differences are to the base arm, paired by episode, pooled over 1, 2, 5 and 10 shots, ± 95 %. An arm is judged with the
encoder in bfloat16, and the states of its frozen layers, which are read once for all arms, in half precision.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import scores
import torch
from cells import HEADLINE, SHOTS, Cell, cells_of, choose_corpora, report_corpora
from contestants import Contestant, contestant_runs
from measure import NOT_YET, Options, markdown, show
from runs import do_missing, made_with, read_lines

from textmeta.errors import TrainingInterrupted
from textmeta.meta.initialisation import Initialisation
from textmeta.meta.trainer import MetaTrainer
from textmeta.sharing.store import load_adapter, save_adapter

sys.path.append(str(Path(__file__).parents[1] / "recipes"))  # the corpora and settings of the shipped adapter
from general import GENERAL, training_corpora

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
CHUNK, EPISODES = 50, 100  # of a line; of a cell
OF_NAMES = ("base", "no-names", "names-after")  # judged with names, too
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
SEARCH = {  # runs in search of a better default
    "full-2000": _learner(2000, layers=(3, 4, 5, 6)),
    "two-views-3000": GENERAL,
    "two-views-6600": replace(GENERAL, episodes=6600),
    "slow-lora": replace(GENERAL, lora_rate=2e-4),
    "six-layers": replace(GENERAL, lora=replace(GENERAL.lora, layers=6), episodes=1500),
    "four-tasks": replace(GENERAL, tasks_per_step=4),
}
STARTS: dict[str, Mapping[str, torch.Tensor]] = {"no-centre": {"log_centre_strength": torch.tensor(-30.0)}}
AFTER = {"names-after": "no-names"}  # the arm whose adapter another starts from
CORPORA = {"corpora-5": 5, "corpora-20": 20}  # how many corpora an arm is trained on, drawn by its seed, if not all


def train(arm: str, data_dir: Path, folder: Path, cache: Path, seed: int = 0) -> None:
    """Meta-train an arm, or go on with it; its adapter is written into a folder of its name."""
    corpora = training_corpora(data_dir)
    order = np.random.default_rng(seed).permutation(len(corpora))[: CORPORA.get(arm, len(corpora))]
    corpora = [corpora[number] for number in sorted(order)]
    start = load_adapter(folder / AFTER[arm])[0] if arm in AFTER else STARTS.get(arm)
    trainer = replace((ARMS | SEARCH)[arm], seed=seed)
    try:
        save_adapter(folder / arm, trainer.train(corpora, output=folder / arm, start=start, cache=cache))
    except TrainingInterrupted as stop:
        sys.exit(str(stop))


def run(cells: list[Cell], data_dir: Path, folder: Path, arms: list[str], episodes: int, cache: Path) -> None:
    """Train and judge what is missing."""
    told, lines = made_with("textmeta", "torch"), read_lines(RESULTS)
    for arm in arms:
        if not (folder / arm / "textmeta.json").exists():
            train(arm, data_dir, folder, cache)
        who = Contestant(folder / arm, precision="bf16", cache=cache)
        who.check_alone(lines)
        variants = ("plain", "names") if arm in OF_NAMES else ("plain",)
        do_missing(contestant_runs(cells, [who], variants, episodes, CHUNK), lines, RESULTS, told)


def tables(choose: bool = False) -> dict[str, str]:
    """Return the table by its name, as Markdown; if nothing is recorded for it, it says so."""
    found = scores.accuracies(read_lines(RESULTS, mend=False))
    others = {corpus for cells in found.values() for corpus, _ in cells}.difference(HEADLINE)
    told = list(rows(found, sorted(others) if choose else list(HEADLINE)))
    return {"ablation": markdown(told) if len(told) > 1 else NOT_YET}


def rows(found: Mapping[str, scores.Cells], corpora: list[str]) -> Iterator[list[str]]:
    """Yield the rows of the table: mean accuracies of an arm, and the difference to the base arm."""
    yield scores.heads(SHOTS, "to the base arm", "episodes")
    for variant in ("plain", "names"):
        for arm in ARMS:
            own = {key: row for key, row in found.get(f"{variant} @ {arm}", {}).items() if key[0] in corpora}
            if not own:
                continue
            rival = "plain" if arm == "base" else variant
            told = scores.difference(own, found.get(f"{rival} @ base", {}), list(own))
            means = [scores.shown(scores.mean(own, k, corpora), "") for k in SHOTS]
            name, base = arm + ", with names" * (variant == "names"), (variant, arm) == ("plain", "base")
            yield [name, *means, "" if base else scores.shown(told), str(min(map(len, own.values())))]


def main() -> None:
    """Print the table, after running what is missing."""
    parser = Options(__doc__, needs_data=False)
    parser.add_argument("--run", action="store_true", help="train and judge what is missing")
    parser.add_argument("--train", choices=(*ARMS, *SEARCH), help="train one arm alone")
    parser.add_argument("--seed", type=int, default=0, help="of --train")
    parser.add_argument("--choose", action="store_true", help="judge on the choose corpora")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of a cell")
    parser.add_argument("--folder", type=Path, default=Path("runs/arms"), help="of the adapters")
    parser.add_argument("--cache", type=Path, default=Path("runs/frozen"), help="states of the frozen layers: 3 GB")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/README.md")
    arguments = parser.parsed()
    if arguments.train:
        train(arguments.train, arguments.data_dir, arguments.folder, arguments.cache, arguments.seed)
        return
    if arguments.run:
        corpora = choose_corpora if arguments.choose else lambda data_dir: report_corpora(data_dir, HEADLINE)
        cells = list(cells_of(corpora(arguments.data_dir)))
        run(cells, arguments.data_dir, arguments.folder, arguments.arms, arguments.episodes, arguments.cache)
    show(tables(arguments.choose), arguments.write and not arguments.choose)


if __name__ == "__main__":
    main()
