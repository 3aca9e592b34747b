"""What the adapter that comes with textmeta reaches on twelve corpora that nothing was trained on.

    python benchmarks/accuracy.py                              # the recorded tables
    python benchmarks/accuracy.py --draw                       # the pictures, from recorded lines
    python benchmarks/accuracy.py --data-dir DATA --quick      # a small version of the first, in 15 minutes on 2 cores
    python benchmarks/accuracy.py --data-dir DATA --run        # records what is missing, what is cheap first; resumes

Episodes are the same for every method: 5 ways (all classes of a corpus with fewer), 5 queries a class, 256 tokens (0.1
at its own 64, SetFit at 64 on corpora of long texts, where it is compared with textmeta at 64). textmeta 0.1 is
recorded by record_v0_1.py --report. The mean is over seven corpora on which the design was not looked for. Differences
are paired by episode; intervals are of 95 %, over episodes, of means over corpora. Pooled is over 1, 2, 5 and 10 shots.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import scores
from baselines import BASELINES, FrozenViews, baseline_runs, rival_runs
from cells import HEADLINE, REPORT, SHOTS, Cell, cells_of, report_corpora
from choose import LAST_LAYER, SHIPPED
from contestants import Contestant, contestant_runs
from measure import NOT_YET, Options, markdown, show
from runs import Line, do_missing, made_with, read_lines

from textmeta.data.episodes import Episode

RESULTS = Path(__file__).parent / "results"
FILES = dict.fromkeys(("frozen", "textmeta", "long"), "report.jsonl") | {"setfit": "report_setfit.jsonl"}
OLD = "report_v0_1.jsonl"
ALL_SHOTS = (*SHOTS, 20)
EPISODES, CHUNK = 600, 100  # of a cell; of a line
LONG, LONG_LENGTH, LONG_EPISODES = ("20news", "arxiv_category", "github_issue_type"), 64, 200  # as SetFit reads them
SETFIT_EPISODES, SETFIT_CHUNK = {1: 20, 2: 20, 5: 20, 10: 10}, 5
FEWER, FEWER_EPISODES = ("permuted", "unlabelled", "names-unlabelled"), 200  # which cost more, or tell less
VARIANTS = ("plain", "names", "names-alone", *FEWER)
QUICK_SHOTS, QUICK_EPISODES, QUICK_VARIANTS = (1, 5, 10), 50, ("plain", "names", "names-alone")
COSINE, WRONG = "names-last-256", "prototypes-last-permuted-256"
NAMED = ("prototypes-last-names-256", "logistic-last-names-256", "logistic-views-names-256")
AS_SETFIT = f"plain-{LONG_LENGTH}"  # of long texts, then of all
MEANS = {  # title -> method, whose names are read or not
    "prototypes, last layer": LAST_LAYER[0],
    "logistic regression, last layer": LAST_LAYER[1],
    "logistic regression, four layers side by side": "logistic-views-256",
    "textmeta 0.1 (64 tokens)": "textmeta-0.1",
    "**textmeta**": "plain",
    "textmeta, 15 unlabelled texts a class": "unlabelled",
}
MEANS_NAMES = {
    "cosine of text and name": COSINE,
    "prototypes, the name one more example": NAMED[0],
    "logistic regression, likewise": NAMED[1],
    "logistic regression on four layers, likewise": NAMED[2],
    "**textmeta**": "names",
    "textmeta, 15 unlabelled texts a class": "names-unlabelled",
    "textmeta, permuted names": "permuted",
    "prototypes, a permuted name one more example": WRONG,
}
GAINS = {  # title, method, and its rivals: the best of them at each number of shots counts
    "baselines": ("textmeta over the better of prototypes and logistic regression", "plain", LAST_LAYER),
    "baselines-others": ("the same, other five corpora", "plain", LAST_LAYER),
    "views": ("textmeta over logistic regression on four layers", "plain", ["logistic-views-256"]),
    "0.1": ("textmeta over 0.1", "plain", ["textmeta-0.1"]),
    "unlabelled": ("unlabelled texts over none", "unlabelled", ["plain"]),
    "names": ("names over none", "names", ["plain"]),
    "named": ("names over the best rival that reads names", "names", [COSINE, *NAMED]),
    "named-others": ("the same, other five corpora, with names", "names", [COSINE, *NAMED]),
    "both": ("names and unlabelled texts over names", "names-unlabelled", ["names"]),
    "permuted": ("permuted names over none", "permuted", ["plain"]),
    "wrong": ("prototypes: a permuted name one more example, over none", WRONG, LAST_LAYER[:1]),
    "setfit": ("textmeta over SetFit (twelve corpora, few episodes)", AS_SETFIT, ["setfit"]),
}


# Recording


def record(arguments: argparse.Namespace, results: Path) -> None:
    """Do the runs that are missing, part by part."""
    corpora, shots, episodes, variants, parts = REPORT, ALL_SHOTS, EPISODES, VARIANTS, arguments.parts
    if arguments.quick:
        corpora, shots, episodes, variants = HEADLINE, QUICK_SHOTS, QUICK_EPISODES, QUICK_VARIANTS
        parts = ["frozen", "textmeta"]
    cells = list(cells_of(report_corpora(arguments.data_dir, corpora), shots))
    who = Contestant(arguments.adapter)
    # as SetFit reads long texts
    short = Contestant(arguments.adapter, max_length=LONG_LENGTH, suffix=f"-{LONG_LENGTH}")

    def setfit(cell: Cell, own: Sequence[Episode]) -> list[np.ndarray]:
        from setfit_rival import setfit_answers  # noqa: PLC0415 - an extra

        return setfit_answers(own, LONG_LENGTH if cell.corpus.name in LONG else 256, arguments.device)

    for part in parts:
        lines = read_lines(results / FILES[part])
        who.check_alone(lines)
        if part == "frozen":
            runs = baseline_runs(cells, list(BASELINES), FrozenViews(256), episodes)
        elif part == "setfit":
            runs = rival_runs(cells, "setfit", setfit, SETFIT_EPISODES, SETFIT_CHUNK)
        elif part == "long":
            long = [cell for cell in cells if cell.corpus.name in LONG and cell.shots in SETFIT_EPISODES]
            runs = contestant_runs(long, [short], ["plain"], LONG_EPISODES, CHUNK)
        else:
            usual, fewer = ([name for name in variants if (name in FEWER) == few] for few in (False, True))
            runs = chain(
                contestant_runs(cells, [who], usual, episodes, CHUNK),
                contestant_runs(cells, [who], fewer, min(episodes, FEWER_EPISODES), CHUNK),
            )
        libraries = ("textmeta", "torch", "transformers", *["setfit"] * (part == "setfit"))
        do_missing(runs, lines, results / FILES[part], {**made_with(*libraries), "device": arguments.device})


# Tables


def recorded(results: Path, adapter: str = SHIPPED.name) -> list[Line]:
    """Return all lines; those of the adapter are called by its variants, those without examples are at 0 shots."""
    lines = [line for name in (*dict.fromkeys(FILES.values()), OLD) for line in read_lines(results / name)]
    for key in (line["key"] for line in lines):
        if key.get("adapter") == adapter:
            key.pop("adapter")
        if key["method"] in ("names-alone", COSINE):
            key |= {"shots": 0, "method": "names" if key["method"] == "names-alone" else COSINE}
    return [line for line in lines if "adapter" not in line["key"]]


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Return the tables by name, as Markdown; one that nothing is recorded for says so."""
    found, errors = scores.accuracies(lines), scores.calibration_errors(lines)
    full = {key: values for key, values in found.get("plain", {}).items() if key[0] not in LONG}
    found[AS_SETFIT] = full | found.get(AS_SETFIT, {})
    others = [name for name in REPORT if name not in HEADLINE]
    of = {"setfit": REPORT, "baselines-others": others, "named-others": others}
    gains = {
        name: scores.differences(found, one, rivals, (0, *ALL_SHOTS), of.get(name, HEADLINE), SHOTS)
        for name, (_, one, rivals) in GAINS.items()
    }
    made: dict[str, scores.Rows] = {
        "means": scores.mean_rows(found, MEANS, ALL_SHOTS, HEADLINE),
        "means-names": scores.mean_rows(found, MEANS_NAMES, (0, *ALL_SHOTS), HEADLINE),
        "means-others": scores.mean_rows(found, MEANS, ALL_SHOTS, others),
        "means-names-others": scores.mean_rows(found, MEANS_NAMES, (0, *ALL_SHOTS), others),
        "gains": [
            scores.heads((0, *ALL_SHOTS), "pooled"),
            *([GAINS[name][0], *map(scores.shown, told)] for name, told in gains.items()),
        ],
        "by-corpus": scores.corpus_rows(
            found, {"textmeta": ("plain", LAST_LAYER), "with names": ("names", NAMED)}, (1, 5, 10), REPORT
        ),
        "goals": goals(found, gains, errors),
        "long": long(lines, errors),
    }
    made["goals-missed"] = scores.missed(made["goals"])
    texts = {name: markdown(rows) for name, rows in made.items()}
    return {name: text if "±" in text or name == "long" else NOT_YET for name, text in texts.items()}


def long(lines: Sequence[Line], errors: Mapping[tuple[str, int], float]) -> scores.Rows:
    """Return macro-F1 and NLL, means over the seven corpora, and ECE, that of all corpora together."""
    table = [scores.heads(ALL_SHOTS)]
    for measure, title in (("f1", "macro-F1, %"), ("nll", "NLL")):
        for method, cells in sorted(scores.accuracies(lines, measure).items()):
            means = [scores.mean(cells, k, HEADLINE) for k in ALL_SHOTS]
            table.append([f"{title}, {method}", *("–" if told is None else f"{told[0]:.2f}" for told in means)])
    for method in dict.fromkeys(method for method, _ in errors):
        parts = [f"{errors[method, k]:.1f}" if (method, k) in errors else "–" for k in ALL_SHOTS]
        table.append([f"ECE, %, {method}", *parts])
    return table


def goals(
    found: Mapping[str, scores.Cells],
    gains: Mapping[str, Sequence[scores.Told | None]],
    errors: Mapping[tuple[str, int], float],
) -> scores.Rows:
    """Return what was wanted beforehand, and by how much it is missed, if so."""

    def of(name: str, shots: int | None, least: float, end: int = 0) -> list[str]:
        number = -1 if shots is None else (0, *ALL_SHOTS).index(shots)
        title = f"{GAINS[name][0]}, {'pooled' if shots is None else scores.heads([shots])[1]}"
        return scores.goal_row(title, gains[name][number], least, end)

    table = [scores.GOALS, of("0.1", None, 0, -1)]
    table += [of("baselines", k, least) for k, least in ((1, 1), (5, 3), (10, 5))]
    for k in (5, 10):
        table.append(of("views", k, 0))
        rival = scores.best(found, LAST_LAYER, k)
        told = {name: scores.difference(found.get("plain", {}), rival, [(name, k)]) for name in REPORT}
        worst = min((sum(part), name) for name, part in told.items() if part)[1] if all(told.values()) else ""
        table.append(scores.goal_row(f"worst corpus, {worst}, over that baseline, {k} shots", told.get(worst), -1, 1))
    table += [of("named", k, 0, -1) for k in (0, *ALL_SHOTS)] + [of("named", 1, 2), of("permuted", 1, -2)]
    table += [of("setfit", None, 0, -1), *(of("setfit", k, -1.5, 1) for k in SHOTS)]
    for k in ALL_SHOTS[1:]:
        error = errors.get(("plain", k))
        verdict = "not run yet" if error is None else "met" if error <= 5 else f"missed by {error - 5:.2f}"
        shown = "–" if error is None else f"{error:.2f}"
        table.append([f"calibration error, percent, {k} shots", "at most 5", shown, verdict])
    return table


def main() -> None:
    """Print the tables, after recording what is asked for."""
    parser = Options(__doc__, tables=True)
    parser.add_argument("--quick", action="store_true", help="record few episodes, of the seven corpora, elsewhere")
    parser.add_argument("--draw", action="store_true", help="draw the pictures")
    parser.add_argument("--parts", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--adapter", type=Path, default=SHIPPED)
    parser.add_argument("--device", default="cpu", help="that SetFit runs on")
    parser.add_argument("--results", type=Path, help="folder")
    arguments = parser.parsed()
    results = arguments.results or (Path("runs/quick") if arguments.quick else RESULTS)
    if arguments.run or arguments.quick:
        record(arguments, results)
    lines = recorded(results, arguments.adapter.name)
    if arguments.draw:
        from pictures import draw  # noqa: PLC0415 - matplotlib is not needed otherwise

        draw(lines, results)
    show(tables(lines), arguments.write)


if __name__ == "__main__":
    main()
