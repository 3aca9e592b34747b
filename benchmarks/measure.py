"""What the benchmarks share: options, timing sides in turn, printing a table."""

import argparse
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

NOT_YET = "Not run yet."  # of a table
PAGES = [Path(__file__).parents[1] / name for name in ("README.md", "benchmarks/README.md", "docs/core.md")]


class Options(argparse.ArgumentParser):
    """The options of a script: its own, and those that most have."""

    def __init__(self, doc: str, *, tables: bool = False, threads: int = 1) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--data-dir", type=Path, required=not tables)
        self.add_argument("--threads", type=int, default=threads)
        if tables:  # which are printed without data, and made by --run
            self.add_argument("--run", action="store_true", help="make and record what is missing")
            self.add_argument("--write", action="store_true", help="write the tables into the pages that have them")

    def parsed(self) -> argparse.Namespace:
        """Parse the command line and set the threads; what reads corpora needs data."""
        found = self.parse_args()
        torch.set_num_threads(found.threads)
        if found.data_dir is None and any(vars(found).get(name) for name in ("run", "quick", "train")):
            self.error("--run, --quick and --train need --data-dir")
        return found


def alternate(sides: dict[str, Callable[[], object]], repeats: int, label: str) -> dict[str, list[float]]:
    """Return the seconds of each side, timed in turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for turn in tqdm(range(1 + repeats), desc=label, unit="turn", leave=False):
        for name, run in sides.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return a table, its head first."""
    head, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * (head.count(" | ") + 1), *others])


def filled(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with each table, by its name, between ``<!-- NAME -->`` and ``<!-- end -->``."""

    def between(found: re.Match) -> str:
        return f"{found[1]}\n{tables[found[2]]}\n\n{found[3]}" if found[2] in tables else found[0]

    return re.sub(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", between, page, flags=re.DOTALL)


def show(tables: Mapping[str, str], write: bool) -> None:
    """Print tables, and write those that the pages have."""
    for name, table in tables.items():
        print(f"\n{name}\n\n{table}")
    for page in PAGES if write else ():
        page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
