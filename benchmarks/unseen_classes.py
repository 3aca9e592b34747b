"""Unseen classes: an adapter that is meta-trained on a fold's train classes alone, on its test classes.

    python benchmarks/unseen_classes.py                        # the recorded tables
    python benchmarks/unseen_classes.py --data-dir DATA --run  # trains and records what is missing; resumes

Five published folds of four corpora; settings are those of recipes/general.py, but fewer episodes, as many as did best
on the valid classes of the first folds: more bring nothing, or harm, with so few classes. Of two folds there is one
more adapter, with the other training corpora beside the fold's classes. 5-way at 1 and 5 shots (600 episodes a fold),
all test classes at once at 1, 5 and 10 (50), what is out of scope of clinc150 (20). Texts are cut at 256 tokens, by 0.1
at 64. Intervals are of 95 %, over episodes.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scores
from baselines import BASELINES, FrozenViews, baseline_runs
from cells import EPISODE_SEED, Cell, cells_of
from contestants import Contestant, contestant_runs, scope_scores
from measure import NOT_YET, Options, markdown, show
from runs import Line, Run, do_missing, made_with, missing, read_lines
from sklearn.metrics import roc_auc_score

from textmeta.data.corpus import Corpus, load_corpus
from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.data.splits import read_class_split
from textmeta.meta.calibration import episodes_with_outside, fit_calibration
from textmeta.meta.learner import TaskLearner
from textmeta.sharing.store import save_adapter

sys.path.append(str(Path(__file__).parents[1] / "recipes"))  # the corpora and settings of the shipped adapter
from general import CALIBRATION_EPISODES, GENERAL, training_corpora

RESULTS = Path(__file__).parent / "results" / "unseen_classes.jsonl"
CORPORA, FOLDS = ("banking77", "clinc150", "huffpost", "20news"), ("01", "02", "03", "04", "05")
ADAPTERS = {"own": FOLDS, "beside": FOLDS[:2]}  # the fold's classes alone, or with other corpora -> folds
TRAINING = {"banking77": 300, "clinc150": 300, "huffpost": 200, "20news": 200, "beside": 600}  # episodes
FIVE_WAY, ALL_WAY, SCOPE = ((1, 5), 600), ((1, 5, 10), 50), ((1, 5, 10), 20)  # shots, and episodes of a cell
CHUNK = 100
OUTSIDE_DRAW = 1  # third number of the seed that texts of no class are drawn by
METHODS = [name for name in BASELINES if name not in ("names-last", "prototypes-last-permuted")]
ROWS = {
    "prototypes": "prototypes-last-256",
    "logistic regression": "logistic-last-256",
    "logistic regression, four layers": "logistic-views-256",
    "textmeta 0.1 (64 tokens)": "textmeta-0.1",
    "**textmeta**": "plain @ own",
    "spread over folds": "plain @ own",
    "names: prototypes": "prototypes-last-names-256",
    "names: logistic regression": "logistic-last-names-256",
    "names: logistic regression, four layers": "logistic-views-names-256",
    "names: textmeta 0.1 (64 tokens)": "textmeta-0.1-names",
    "**names: textmeta**": "names @ own",
    "names: spread over folds": "names @ own",
    "gain of other corpora beside (two folds)": "plain @ beside",
    "names: gain of other corpora beside (two folds)": "names @ beside",
}
SHORT = ("prototypes", "logistic regression", "textmeta 0.1 (64 tokens)", "**textmeta**", "names: prototypes")
SHORT += ("names: logistic regression", "**names: textmeta**", "gain of other corpora beside (two folds)")
SCOPE_ROWS = {
    "prototypes": "prototypes-last",
    "logistic regression": "logistic-last",
    "textmeta 0.1 (64 tokens)": "textmeta-0.1",
    "**textmeta**": "plain @ own",
    "textmeta, other corpora beside": "plain @ beside",
}
PUBLISHED = {  # 5-way at 1 and 5 shots, BERT-base (110 M); LAQDA reads names and all queries; its last four by others
    "ProtAugment": (89.6, 94.7, 96.5, 98.7),
    "ContrastNet": (91.2, 96.4, 96.6, 98.5),
    "names, queries: LAQDA": (89.2, 94.8, 97.0, 98.6, 56.7, 72.3, 77.1, 85.4),
}
AIMS = {("banking77", 1): 91.2, ("banking77", 5): 97.0, ("clinc150", 1): 97.0, ("clinc150", 5): 99.2}
ERRORS_CUT = {"banking77": 30, "clinc150": 30, "huffpost": 20, "20news": 20}  # percent


whole = cache(load_corpus)


@dataclass(frozen=True)
class Fold:
    """A fold of a corpus, by their names, of a data folder."""

    data_dir: Path
    name: str
    fold: str

    @property
    def label(self) -> str:
        """What lines call it."""
        return f"{self.name}-{self.fold}"

    def part(self, part: str) -> Corpus:
        """Return its "train", "valid" or "test" classes."""
        classes = getattr(read_class_split(self.data_dir / f"{self.name}.splits.json", self.fold), part)
        return replace(whole(str(self.data_dir / f"{self.name}.jsonl")).restrict(classes), name=self.label)

    @cached_property
    def cells(self) -> list[tuple[Cell, int]]:
        """Cells of the test classes, and their episodes: 5-way, and all-way."""
        test = self.part("test")
        five = [(cell, FIVE_WAY[1]) for cell in cells_of([test], FIVE_WAY[0])]
        return five + [(cell, ALL_WAY[1]) for cell in cells_of([test], ALL_WAY[0], len(test.class_names))]

    @property
    def scope_cells(self) -> list[Cell]:
        """Those that come with texts of no class."""
        return [cell for cell, _ in self.cells[len(FIVE_WAY[0]) :] if self.name == "clinc150"]


# Recording


def train(fold: Fold, kind: str, folder: Path, cache: Path | None) -> None:
    """Meta-train the adapter of a fold, into a folder."""
    corpora = [fold.part("train")]
    if kind == "beside":
        corpora += [corpus for corpus in training_corpora(fold.data_dir) if corpus.name != fold.name]
    trainer = replace(GENERAL, episodes=TRAINING[fold.name if kind == "own" else kind])
    adapter = trainer.train(corpora, output=folder, cache=cache if kind == "beside" else None)
    if fold.scope_cells:  # the rule of the scope is set on classes that the adapter has not seen
        valid = MixedEpisodes([fold.part("valid")], trainer.seed, names=trainer.names)
        unseen = episodes_with_outside(valid, CALIBRATION_EPISODES)
        adapter = replace(adapter, scope=fit_calibration(TaskLearner(adapter.load_reader(), adapter), unseen))
    save_adapter(folder, adapter)


@cache
def outside_texts(path: Path) -> list[str]:
    """Return the different texts of the test split."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(row["text"] for row in rows if row["split"] == "test"))


def with_outside(episode: Episode, number: int, texts: Sequence[str]) -> Episode:
    """Return an episode with as many further queries, of no class, as it has."""
    count = len(episode.query_texts)
    rows = np.random.default_rng((EPISODE_SEED, number, OUTSIDE_DRAW)).choice(len(texts), count, replace=False)
    queries = (*episode.query_texts, *(texts[row] for row in rows))
    labels = np.concatenate([episode.query_labels, np.full(count, OUTSIDE)])
    return replace(episode, query_texts=queries, query_labels=labels)


def scope_run(fold: Fold, cell: Cell, method: str, who: Contestant | FrozenViews) -> Run:
    """Return the run that tells what is out of scope: by an adapter, or the largest probability of a baseline."""

    def work() -> dict[str, Any]:
        texts = outside_texts(fold.data_dir / f"{fold.name}_oos.jsonl")
        episodes = [with_outside(cell.episode(number), number, texts) for number in range(SCOPE[1])]
        if isinstance(who, Contestant):
            learner = who.learner_of(cell, episodes)
            sure = [scope_scores(learner, episode)[0] for episode in episodes]
        else:
            who.read([text for e in episodes for text in (*e.support_texts, *e.query_texts)])
            sure = [BASELINES[method].answer(who, episode).max(1) for episode in episodes]
        found = [roc_auc_score(e.query_labels != OUTSIDE, own) for e, own in zip(episodes, sure, strict=True)]
        return {"auroc": [round(1e4 * value) for value in found], "adapter_sha256": getattr(who, "digest", None)}

    adapter = {} if isinstance(who, FrozenViews) else {"adapter": who.name}
    return Run({**cell.key(f"scope-{method}", 0, SCOPE[1]), **adapter}, work)


def frozen_runs(folds: Sequence[Fold]) -> Iterator[Run]:
    """Yield the runs of what is not trained."""
    frozen = FrozenViews(256)
    for fold in folds:
        for cell, episodes in fold.cells:
            yield from baseline_runs([cell], METHODS, frozen, episodes)
        for cell in fold.scope_cells:
            yield from (scope_run(fold, cell, method, frozen) for method in ("prototypes-last", "logistic-last"))


def adapter_runs(fold: Fold, who: Contestant) -> Iterator[Run]:
    """Yield the runs of a fold's adapter."""
    for cell, episodes in fold.cells:
        yield from contestant_runs([cell], [who], ("plain", "names"), episodes, CHUNK)
    yield from (scope_run(fold, cell, "plain", who) for cell in fold.scope_cells)


def record(data_dir: Path, results: Path, folder: Path, cache: Path | None, corpora: Sequence[str]) -> None:
    """Do the runs that are missing, training the adapters that they need."""
    lines, told = read_lines(results), {**made_with("textmeta", "torch", "transformers"), "device": "cpu"}
    folds = [Fold(data_dir, name, fold) for name in corpora for fold in FOLDS]
    do_missing(frozen_runs(folds), lines, results, told)
    for kind, names in ADAPTERS.items():
        for fold in [fold for fold in folds if fold.fold in names]:
            who = Contestant(folder / f"{fold.label}-{kind}", name=kind)
            if runs := missing(adapter_runs(fold, who), lines):
                if not (who.folder / "textmeta.json").exists():
                    train(fold, kind, who.folder, cache)
                who.check_alone(lines, fold.label)
                do_missing(runs, lines, results, told)


# Tables


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Return the tables by name, as Markdown; one that nothing is recorded for says so."""
    scored = [line for line in lines if "right" in line["result"]]
    five = scores.accuracies([line for line in scored if "ways" not in line["key"]])
    every = scores.accuracies([line for line in scored if "ways" in line["key"]])
    scope: dict[str, scores.Cells] = {}
    for line in [line for line in lines if "auroc" in line["result"]]:
        cells = scope.setdefault(scores.method_of(line["key"]).removeprefix("scope-"), {})
        cells[line["key"]["corpus"], line["key"]["shots"]] = np.array(line["result"]["auroc"]) / 100
    made = {"five-way": fold_rows(five, FIVE_WAY[0]), "all-way": fold_rows(every, ALL_WAY[0])}
    made |= {f"{name}-short": [row for row in rows if not row[0] or row[0] in SHORT] for name, rows in made.items()}
    made["five-way-short"] += [
        [title, *map(str, known), *["–"] * (8 - len(known))] for title, known in PUBLISHED.items()
    ]
    made["scope"] = scores.mean_rows(scope, SCOPE_ROWS, SCOPE[0])
    made["classes-goals"] = goals(five)
    ready = any(line["key"].get("adapter") == "own" for line in lines)
    return {name: markdown(rows) if ready else NOT_YET for name, rows in made.items()}


def fold_rows(found: Mapping[str, scores.Cells], shots: Sequence[int]) -> scores.Rows:
    """Return means over the folds, and half their interval; the spread is the standard deviation over folds."""
    table = [["", *(f"{name}, {head}" for name in CORPORA for head in scores.heads(shots)[1:])]]
    for title, method in ROWS.items():
        cells, row = found.get(method, {}), [title]
        for folds, k in ((folds_of(name), k) for name in CORPORA for k in shots):
            told = scores.mean(cells, k, folds)
            if "gain" in title:
                own = found.get(method.replace("beside", "own"), {})
                row.append(scores.shown(scores.difference(cells, own, [(fold, k) for fold in folds])))
            elif told is None:
                row.append("–")
            elif "spread" in title:
                row.append(f"{np.std([cells[fold, k].mean() for fold in folds], ddof=1):.1f}")
            else:
                row.append(f"{told[0]:.1f}±{told[1]:.1f}")
        if set(row[1:]) != {"–"}:
            table.append(row)
    return table


def folds_of(name: str) -> list[str]:
    """Return what lines call the folds of a corpus."""
    return [f"{name}-{fold}" for fold in FOLDS]


def goals(five: Mapping[str, scores.Cells]) -> scores.Rows:
    """Return what was wanted beforehand of each cell of five ways, and what is found."""
    cells = [(name, k) for name in CORPORA for k in FIVE_WAY[0]]
    table = [["", *(f"{name}, {scores.heads([k])[1]}" for name, k in cells)]]
    over, cut = ["over 0.1 (wanted: above 0)"], ["errors of prototypes cut by, %"]
    for name, k in cells:
        ours, frozen = (
            scores.mean(five.get(method, {}), k, folds_of(name)) for method in ("plain @ own", "prototypes-last-256")
        )
        over.append(scores.shown(scores.differences(five, "plain @ own", ["textmeta-0.1"], [k], folds_of(name))[0]))
        cut.append(f"{100 * (ours[0] - frozen[0]) / (100 - frozen[0]):.1f}" if ours and frozen else "–")
    table += [over, ["accuracy wanted", *(f"{AIMS[cell]:.1f}" if cell in AIMS else "–" for cell in cells)]]
    table += [cut, ["wanted", *(str(ERRORS_CUT[name]) for name, _ in cells)]]
    return table


def main() -> None:
    """Print the tables, after recording what is asked for."""
    parser = Options(__doc__, tables=True)
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--folder", type=Path, default=Path("runs/folds"), help="of the adapters")
    parser.add_argument("--cache", type=Path, default=Path("runs/frozen"), help="states of the frozen layers")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parsed()
    if arguments.run:
        record(arguments.data_dir, arguments.results, arguments.folder, arguments.cache, arguments.corpora)
    show(tables(read_lines(arguments.results)), arguments.write)


if __name__ == "__main__":
    main()
