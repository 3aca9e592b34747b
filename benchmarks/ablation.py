"""The choices that decide the core's design, each an arm trained for 15 minutes and judged on the choose corpora.

    python benchmarks/ablation.py                          # the table, from recorded episodes
    python benchmarks/ablation.py --data-dir DATA --run    # trains and judges what is missing, one arm after another

Each line is the difference to the base arm (mean of its three seeds), or, where nothing was trained, to the same
adapter without it; paired by episode, pooled over 1, 2, 5 and 10 shots and all corpora, ± 95 %. What does not gain 0.2
points beyond its interval and the base arm's spread is left out.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scores
from cells import SHOTS, cells_of, choose_corpora
from choose import CORE, EPISODES
from measure import print_table
from runs import read_lines
from train_core import AFTER, ARMS

HERE = Path(__file__).parent
FROZEN = Path("runs/frozen")
BASE = ("base-0", "base-1", "base-2")


@dataclass(frozen=True)
class Judged:
    """A line of the table.

    Args:
        adapter: name of its folder: the arm and its seed.
        variant: of the episodes.
        change: the option of choose.py that does otherwise than the adapter, without training, and its value.
        shots: by default all.
        episodes: of a cell, if not as many as of the other lines.
    """

    adapter: str
    variant: str = "plain"
    change: tuple[str, ...] = ()
    shots: tuple[int, ...] = SHOTS
    episodes: int | None = None

    @property
    def method(self) -> str:
        """What choose.py calls it."""
        return f"{self.variant}{'='.join(self.change).replace('--', ' ')} @ {self.adapter}"

    @property
    def rivals(self) -> list[str]:
        """What it is compared with: the base arm's seeds, or what the same adapter does without the change."""
        if self.change:
            return [f"{self.variant} @ {self.adapter}"]
        if self.variant == "unlabelled":
            return [f"plain @ {self.adapter}"]
        return [f"{self.variant} @ {name}" for name in BASE]


LINES = [
    *(Judged(name, variant) for variant in ("plain", "names") for name in BASE),
    *(Judged(f"{arm}-0") for arm in ARMS if arm not in ("base", "names-after")),
    Judged("names-after-0", "names"),
    Judged("base-0", "unlabelled"),
    Judged("base-0", "unlabelled", ("--rounds", "0")),
    Judged("base-0", "unlabelled", ("--rounds", "1")),
    Judged("base-0", "plain", ("--evidence-after",)),
    Judged("base-0", "plain", ("--adapt", "pooling+lora"), shots=(5,), episodes=50),
]


def run(data_dir: Path, folder: Path, lines: Sequence[Judged], episodes: int) -> None:
    """Train and judge what is missing, the encoder in bfloat16 and each frozen layer read once for all adapters."""
    told = ["--data-dir", str(data_dir), "--cache", str(FROZEN)]
    for line in lines:
        arm, _, seed = line.adapter.rpartition("-")
        output, number = folder / line.adapter, line.episodes or episodes
        if _complete(line, data_dir, number):
            continue
        if not (output / "textmeta.json").exists():
            start = ["--start", str(folder / f"{AFTER[arm]}-{seed}")] if arm in AFTER else []
            _call("train_core.py", *told, "--arm", arm, "--seed", seed, "--output", str(output), *start)
        judge = [*told, "--run", "--adapters", str(output), "--variants", line.variant, "--precision", "bf16"]
        judge += ["--episodes", str(number), "--shots", *map(str, line.shots), *line.change]
        _call("choose.py", *judge)


def _complete(line: Judged, data_dir: Path, episodes: int) -> bool:
    """Whether all cells of a line are recorded."""
    found = scores.accuracies(read_lines(CORE, mend=False)).get(line.method, {})
    wanted = {(cell.corpus.name, cell.shots) for cell in cells_of(choose_corpora(data_dir), line.shots)}
    return all(len(found.get(key, ())) >= episodes for key in wanted)


def _call(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


def table(found: dict[str, scores.Cells]) -> Iterator[list[str]]:
    """Yield the rows of the table."""
    yield scores.heads(SHOTS, "pooled")
    for line in LINES:
        own = found.get(line.method)
        rivals = [found[name] for name in line.rivals if name in found]
        if not own or not rivals:
            continue
        base = {
            key: np.mean([part[key][: min(len(r[key]) for r in rivals)] for part in rivals], axis=0)
            for key in own
            if all(key in part for part in rivals)
        }
        told = [scores.difference(own, base, [key for key in base if key[1] == k]) for k in SHOTS]
        pooled = scores.difference(own, base, list(base))
        yield [line.method, *map(scores.shown, [*told, pooled])]


def main() -> None:
    """Print the table, after running what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--arms", nargs="+", help="adapters to run, such as base-0; by default all")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of a cell")
    parser.add_argument("--folder", type=Path, default=Path("runs/core"), help="of the adapters")
    arguments = parser.parse_args()
    if arguments.run:
        if arguments.data_dir is None:
            parser.error("--run needs --data-dir")
        run(
            arguments.data_dir,
            arguments.folder,
            [line for line in LINES if not arguments.arms or line.adapter in arguments.arms],
            arguments.episodes,
        )
    print_table(list(table(scores.accuracies(read_lines(CORE, mend=False)))))


if __name__ == "__main__":
    main()
