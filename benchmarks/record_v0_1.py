"""Record textmeta 0.1, in an environment that has it, on the choose corpora or those to report by.

    git worktree add V01 55df756 && python -m venv V01/.venv && V01/.venv/bin/pip install 'V01[demo]'
    V01/.venv/bin/python benchmarks/record_v0_1.py --data-dir DATA --commit 55df756
    V01/.venv/bin/python benchmarks/record_v0_1.py --data-dir DATA --commit 55df756 --report

0.1's default adapter as users get it (twelve LoRA steps a task, 64 tokens): 20 episodes a cell of the choose corpora,
and 50 (20 at 20 shots) of those to report by. On the choose corpora the baselines, too (200 episodes, at 64 and at 256
tokens). Each chunk of episodes is a line of the results, and is not repeated.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from baselines import BASELINES, FrozenViews, baseline_runs
from cells import SHOTS, Cell, cells_of, choose_corpora, report_corpora, result_of
from measure import Options
from runs import Run, do_missing, read_lines

from textmeta import FewShotClassifier
from textmeta.data.episodes import Episode

RESULTS = Path(__file__).parent / "results"
LENGTHS, BASELINE_EPISODES, CHUNK = (64, 256), 200, 5
CHOOSE_EPISODES, REPORT_EPISODES, EPISODES_OF_20 = 20, 50, 20


def old(classifier: Callable[[], FewShotClassifier], cell: Cell, first: int) -> dict[str, list[int]]:
    """Score textmeta 0.1."""
    episodes = [cell.episode(number) for number in range(first, first + CHUNK)]
    return result_of([answer(classifier(), e) for e in episodes], episodes)


def answer(classifier: FewShotClassifier, episode: Episode) -> np.ndarray:
    """Fit on the support set of an episode and tell the probabilities of its queries."""
    classifier.fit(list(episode.support_texts), episode.support_labels.tolist())
    return classifier.predict_proba(list(episode.query_texts))


def old_runs(cells: Sequence[Cell], episodes: int) -> Iterator[Run]:
    """Yield the runs of 0.1: a chunk of every cell before the next chunk of any."""
    classifier = cache(FewShotClassifier)
    for first in range(0, episodes, CHUNK):
        for cell in cells:
            if first < (EPISODES_OF_20 if cell.shots == 20 else episodes):
                key = cell.key("textmeta-0.1", first, CHUNK)
                yield Run(key, lambda cell=cell, first=first: old(classifier, cell, first))


def main() -> None:
    """Do the runs that are missing."""
    parser = Options(__doc__)
    parser.add_argument("--commit", required=True, help="of the installed textmeta, told in every line")
    parser.add_argument("--report", action="store_true", help="on the corpora to report by")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--parts", nargs="+", choices=("baselines", "old"), default=["baselines", "old"])
    arguments = parser.parsed()
    warnings.filterwarnings("ignore", category=FutureWarning)
    output = arguments.output or RESULTS / ("report_v0_1.jsonl" if arguments.report else "v0_1.jsonl")
    runs: list[Run] = []
    if arguments.report:
        runs += old_runs(list(cells_of(report_corpora(arguments.data_dir), (*SHOTS, 20))), REPORT_EPISODES)
    else:
        cells = list(cells_of(choose_corpora(arguments.data_dir)))
        methods = [name for name, baseline in BASELINES.items() if baseline.variant in ("names-alone", "plain")]
        for length in LENGTHS if "baselines" in arguments.parts else ():
            runs += baseline_runs(cells, methods, FrozenViews(length), BASELINE_EPISODES)
        if "old" in arguments.parts:
            runs += old_runs(cells, CHOOSE_EPISODES)
    do_missing(runs, read_lines(output), output, {"commit": arguments.commit})


if __name__ == "__main__":
    main()
