"""What each part of the core is worth: arms that are trained for as long, all else alike.

    python benchmarks/ablation.py                                  # the tables, from recorded episodes
    python benchmarks/ablation.py --data-dir DATA --run            # trains and judges what is missing, arm after arm
    python benchmarks/ablation.py --data-dir DATA --run --choose   # more arms, on the choose corpora
    python benchmarks/ablation.py --data-dir DATA --train full-2000 --folder runs/search   # goes on where it was

--train also makes the runs in search of a better default, SEARCH, into a folder of their name, for choose.py.

The arms of REPORTED are judged on the seven corpora of the headline (accuracy.py); with --choose, all arms on the 25
that designs are chosen by. Differences are to the base arm, paired by episode, ± 95 %. An arm is judged with the
encoder in bfloat16, and the states of its frozen layers, which are read once for all arms, in half precision.
"""

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import scores
import torch
from cells import HEADLINE, SHOTS, Cell, cells_of, choose_corpora, report_corpora
from contestants import Contestant, contestant_runs
from measure import NOT_YET, Options, markdown, show
from runs import do_missing, made_with, missing, read_lines

from textmeta.errors import TrainingInterrupted
from textmeta.meta.initialisation import Initialisation
from textmeta.meta.trainer import MetaTrainer
from textmeta.sharing.store import load_adapter, save_adapter

sys.path.append(str(Path(__file__).parents[1] / "recipes"))  # the corpora and settings of the shipped adapter
from general import GENERAL, training_corpora

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
CHUNK, EPISODES = 50, 100  # of a line; of a cell
OF_NAMES = ("base", "no-names", "names-after")  # judged with names, too
REPORTED = ("base", "last-layer", "views", "views-steps", "fomaml", "reptile", "meta-sgd", "protonet")
REPORTED += "corpora-5", "corpora-20"
BASE = replace(GENERAL, episodes=1600)
# all tensors that have no part in names
NOT_OF_NAMES = tuple(f.name for f in fields(Initialisation) if "name" not in f.name and f.name != "log_zero_shot_scale")


def _learner(episodes: int = BASE.episodes, *, fixed: tuple[str, ...] = (), **changes: Any) -> MetaTrainer:
    return replace(BASE, learner=replace(BASE.learner, **changes), episodes=episodes, fixed=fixed)


# All arms take as long as the base arm: numbers of episodes are by time measured on equal episodes.
ARMS: dict[str, MetaTrainer] = {
    "base": BASE,
    "last-layer": _learner(5600, fixed=("lora.",), layers=(6,), adapt="none"),
    "views": _learner(5600, fixed=("lora.",), adapt="none"),
    "views-steps": _learner(3360, fixed=("lora.",)),
    "seed-1": replace(BASE, seed=1),
    "seed-2": replace(BASE, seed=2),
    "views-lora": _learner(2150, adapt="none"),
    "layers-6": _learner(1740, layers=(6,)),
    "layers-3-to-6": _learner(1370, layers=(3, 4, 5, 6)),
    "layers-2-4-6": _learner(1480, layers=(2, 4, 6)),
    "layers-0-to-6": _learner(layers=(0, 1, 2, 3, 4, 5, 6)),
    "steps-3": _learner(1770, steps=3),
    "steps-12": _learner(1340, steps=12),
    "fomaml": replace(BASE, algorithm="fomaml", episodes=1680),
    "reptile": replace(BASE, algorithm="reptile", episodes=1260),
    "meta-sgd": replace(BASE, algorithm="meta_sgd", episodes=1450),
    "protonet": replace(BASE, algorithm="protonet", episodes=2000),
    "anil": replace(BASE, algorithm="anil", episodes=2000),
    "no-centre": replace(BASE, fixed=("centre", "log_centre_strength")),
    "corpora-5": BASE,
    "corpora-20": BASE,
    "no-names": replace(BASE, names=0.0),
    "names-after": replace(BASE, episodes=200, fixed=NOT_OF_NAMES),  # the names' own numbers, once all else is learned
}
SEARCH = {  # runs in search of a better default
    "full-2000": _learner(2000, layers=(3, 4, 5, 6)),
    "two-views-3000": GENERAL,
    "two-views-3000-seed-1": replace(GENERAL, seed=1),
    "two-views-3000-seed-2": replace(GENERAL, seed=2),
    "two-views-6600": replace(GENERAL, episodes=6600),
    "slow-lora": replace(GENERAL, lora_rate=2e-4),
    "six-layers": replace(GENERAL, lora=replace(GENERAL.lora, layers=6), episodes=1500),
    "four-tasks": replace(GENERAL, tasks_per_step=4),
    "lora-steps": replace(  # the step sizes of LoRA alone, once all else is learned
        GENERAL,
        learner=replace(GENERAL.learner, adapt="pooling+lora"),
        algorithm="fomaml",
        episodes=600,
        fixed=("lora.", *(f.name for f in fields(Initialisation) if not f.name.startswith("lora"))),
    ),
}
STARTS: dict[str, Mapping[str, torch.Tensor]] = {"no-centre": {"log_centre_strength": torch.tensor(-30.0)}}
AFTER = {"names-after": "no-names", "lora-steps": "two-views-3000"}  # the arm whose adapter another starts from
CORPORA = {"corpora-5": 5, "corpora-20": 20}  # how many corpora an arm is trained on, drawn by its seed, if not all


def train(arm: str, data_dir: Path, folder: Path, cache: Path) -> None:
    """Meta-train an arm, or go on with it; its adapter is written into a folder of its name."""
    trainer, corpora = (ARMS | SEARCH)[arm], training_corpora(data_dir)
    order = np.random.default_rng(trainer.seed).permutation(len(corpora))[: CORPORA.get(arm, len(corpora))]
    corpora = [corpora[number] for number in sorted(order)]
    start = load_adapter(folder / AFTER[arm])[0] if arm in AFTER else STARTS.get(arm)
    try:
        save_adapter(folder / arm, trainer.train(corpora, output=folder / arm, start=start, cache=cache))
    except TrainingInterrupted as stop:
        sys.exit(str(stop))


def run(cells: list[Cell], data_dir: Path, folder: Path, arms: Iterable[str], episodes: int, cache: Path) -> None:
    """Train and judge what is missing."""
    told, lines = made_with("textmeta", "torch"), read_lines(RESULTS)
    for arm in arms:
        variants = ("plain", "names") if arm in OF_NAMES else ("plain",)
        who = Contestant(folder / arm, precision="bf16", cache=cache)
        if runs := missing(contestant_runs(cells, [who], variants, episodes, CHUNK), lines):
            if not (who.folder / "textmeta.json").exists():
                train(arm, data_dir, folder, cache)
            who.check_alone(lines)
            do_missing(runs, lines, RESULTS, told)


def tables() -> dict[str, str]:
    """Return the tables by name, as Markdown; one that nothing is recorded for says so."""
    found = scores.accuracies(read_lines(RESULTS))
    others = sorted({corpus for cells in found.values() for corpus, _ in cells}.difference(HEADLINE))
    made = {"ablation": rows(found, HEADLINE, REPORTED), "ablation-choose": rows(found, others, ARMS)}
    return {name: markdown(table) if len(table) > 1 else NOT_YET for name, table in made.items()}


def rows(found: Mapping[str, scores.Cells], corpora: Collection[str], arms: Iterable[str]) -> scores.Rows:
    """Return the means of the base arm, and differences to it; of arms with names, to the base arm with names."""
    table, episodes = [scores.heads(SHOTS, "pooled")], []
    for variant, arm in product(("plain", "names"), arms):
        own = {key: row for key, row in found.get(f"{variant} @ {arm}", {}).items() if key[0] in corpora}
        if not own:
            continue
        named = arm + ", with names" * (variant == "names")
        if named == "base":
            told = [scores.shown(scores.mean(own, k, corpora), "") for k in SHOTS] + [""]
        else:
            rival = "plain @ base" if arm == "base" else f"{variant} @ base"
            told = [
                scores.shown(part) for part in scores.differences(found, f"{variant} @ {arm}", [rival], SHOTS, corpora)
            ]
        table.append([named, *told])
        episodes += map(len, own.values())
    if episodes:
        table[0][0] = f"{min(episodes)} episodes a cell"
    return table


def main() -> None:
    """Print the table, after running what is missing."""
    parser = Options(__doc__, tables=True)
    parser.add_argument("--train", choices=(*ARMS, *SEARCH), help="train one arm alone")
    parser.add_argument("--choose", action="store_true", help="judge on the choose corpora")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all that are judged there")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of a cell")
    parser.add_argument("--folder", type=Path, default=Path("runs/arms"), help="of the adapters")
    parser.add_argument("--cache", type=Path, default=Path("runs/frozen"), help="states of the frozen layers: 3 GB")
    arguments = parser.parsed()
    if arguments.train:
        train(arguments.train, arguments.data_dir, arguments.folder, arguments.cache)
        return
    if arguments.run:
        corpora = choose_corpora if arguments.choose else lambda data_dir: report_corpora(data_dir, HEADLINE)
        cells = list(cells_of(corpora(arguments.data_dir)))
        arms = arguments.arms or (ARMS if arguments.choose else REPORTED)
        run(cells, arguments.data_dir, arguments.folder, arms, arguments.episodes, arguments.cache)
    show(tables(), arguments.write)


if __name__ == "__main__":
    main()
