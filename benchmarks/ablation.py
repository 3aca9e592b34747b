"""What each part of the core is worth: arms of 15 minutes of training each, all else alike.

    python benchmarks/ablation.py                          # the table, from recorded episodes
    python benchmarks/ablation.py --data-dir DATA --run    # trains and judges what is missing, one arm after another

It is judged on the seven corpora of the headline (accuracy.py), or with --choose on the 25 that designs are chosen by.
Differences are to the base arm, paired by episode, pooled over 1, 2, 5 and 10 shots, ± 95 %. An arm is judged with the
encoder in bfloat16, and the states of its frozen layers, which are read once for all arms, in half precision.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import scores
from cells import HEADLINE, SHOTS, Cell, cells_of, choose_corpora, report_corpora
from contestants import Contestant, contestant_runs
from measure import NOT_YET, Options, markdown, show
from runs import do_missing, made_with, read_lines
from train_core import AFTER, ARMS

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "ablation.jsonl"
CHUNK, EPISODES = 50, 100  # of a line; of a cell
BASE = "base"
OF_NAMES = ("base", "no-names", "names-after")  # judged with names, too


def run(cells: list[Cell], data_dir: Path, folder: Path, arms: list[str], episodes: int) -> None:
    """Train and judge what is missing."""
    told, lines, frozen = made_with("textmeta", "torch"), read_lines(RESULTS), folder.parent / "frozen"
    for arm in arms:
        if not (folder / arm / "textmeta.json").exists():
            command = [sys.executable, HERE / "train_core.py", "--data-dir", data_dir, "--cache", frozen, "--arm", arm]
            start = ["--start", folder / AFTER[arm]] if arm in AFTER else []
            subprocess.run([*map(str, [*command, "--output", folder / arm, *start])], check=True)
        who = Contestant(folder / arm, precision="bf16", cache=frozen)
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
            rival = "plain" if arm == BASE else variant
            told = scores.difference(own, found.get(f"{rival} @ {BASE}", {}), list(own))
            means = [scores.shown(scores.mean(own, k, corpora), "") for k in SHOTS]
            name, base = arm + ", with names" * (variant == "names"), (variant, arm) == ("plain", BASE)
            yield [name, *means, "" if base else scores.shown(told), str(min(map(len, own.values())))]


def main() -> None:
    """Print the table, after running what is missing."""
    parser = Options(__doc__, needs_data=False)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--choose", action="store_true", help="judge on the choose corpora")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of a cell")
    parser.add_argument("--folder", type=Path, default=Path("runs/arms"), help="of the adapters")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/README.md")
    arguments = parser.parsed()
    if arguments.run:
        corpora = choose_corpora if arguments.choose else lambda data_dir: report_corpora(data_dir, HEADLINE)
        cells = list(cells_of(corpora(arguments.data_dir)))
        run(cells, arguments.data_dir, arguments.folder, arguments.arms, arguments.episodes)
    show(tables(arguments.choose), arguments.write and not arguments.choose)


if __name__ == "__main__":
    main()
