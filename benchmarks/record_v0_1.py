"""Record textmeta 0.1, in an environment that has it, on the choose corpora or those to report by.

    git worktree add V01 55df756 && python -m venv V01/.venv && V01/.venv/bin/pip install 'V01[demo]'
    V01/.venv/bin/python benchmarks/record_v0_1.py --data-dir DATA --commit 55df756
    V01/.venv/bin/python benchmarks/record_v0_1.py --data-dir DATA --commit 55df756 --report

0.1's default adapter as users get it (twelve LoRA steps a task, 64 tokens): 20 episodes a cell of the choose corpora,
and 50 (20 at 20 shots) of those to report by. On the choose corpora the baselines, too (200 episodes, at 64 and at 256
tokens). Each chunk of episodes is a line of the results, and is not repeated.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
from baselines import BASELINES, FrozenViews, baseline_runs, rival_runs
from cells import SHOTS, Cell, cells_of, choose_corpora, report_corpora
from measure import Options
from runs import do_missing, read_lines

from textmeta import FewShotClassifier
from textmeta.data.episodes import Episode

RESULTS = Path(__file__).parent / "results"
LENGTHS, BASELINE_EPISODES, CHUNK = (64, 256), 200, 5
CHOOSE_EPISODES, REPORT_EPISODES = dict.fromkeys(SHOTS, 20), {**dict.fromkeys(SHOTS, 50), 20: 20}  # by shots
classifier = cache(FewShotClassifier)


def answers(cell: Cell, episodes: Sequence[Episode]) -> list[np.ndarray]:
    """Fit textmeta 0.1 on the support set of each episode, and tell the probabilities of its queries."""
    fitted = (classifier().fit(list(e.support_texts), e.support_labels.tolist()) for e in episodes)
    return [one.predict_proba(list(e.query_texts)) for one, e in zip(fitted, episodes, strict=True)]


def main() -> None:
    """Do the runs that are missing."""
    parser = Options(__doc__)
    parser.add_argument("--commit", required=True, help="of the installed textmeta, told in every line")
    parser.add_argument("--report", action="store_true", help="on the corpora to report by")
    arguments = parser.parsed()
    warnings.filterwarnings("ignore", category=FutureWarning)
    output = RESULTS / ("report_v0_1.jsonl" if arguments.report else "v0_1.jsonl")
    if arguments.report:
        cells = list(cells_of(report_corpora(arguments.data_dir), list(REPORT_EPISODES)))
        runs = rival_runs(cells, "textmeta-0.1", answers, REPORT_EPISODES, CHUNK)
    else:
        cells = list(cells_of(choose_corpora(arguments.data_dir)))
        methods = [name for name, baseline in BASELINES.items() if baseline.variant in ("names-alone", "plain")]
        parts = [baseline_runs(cells, methods, FrozenViews(length), BASELINE_EPISODES) for length in LENGTHS]
        runs = chain(*parts, rival_runs(cells, "textmeta-0.1", answers, CHOOSE_EPISODES, CHUNK))
    do_missing(runs, read_lines(output), output, {"commit": arguments.commit})


if __name__ == "__main__":
    main()
