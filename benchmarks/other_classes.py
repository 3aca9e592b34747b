"""What an adapter says of other classes than a task's: are their texts told, and are those of related corpora near?

    python benchmarks/other_classes.py --data-dir DATA --table scope
    python benchmarks/other_classes.py --data-dir DATA --table nearest

scope: AUROC in percent, mean over episodes, on every choose corpus of three classes or more: 5 shots, at most five of
the classes and at least one left out, 5 queries a class and as many texts of the classes that are left out. Beside the
scope score it is that of the largest class probability.

nearest: some training corpora label the same texts, or the same kind of text, in several ways: two sets of entity
types, topics and stances of the same arguments. Of 5-way 5-shot tasks of each corpus that has such a relative in the
adapter's index, its own classes left out: for how many classes, in percent, is one of a relative the nearest, or among
the nearest five? Beside it, what a class drawn at random would be.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from cells import EPISODE_SEED, cells_of, choose_corpora
from choose import SHIPPED
from contestants import scope_scores
from measure import Options
from sklearn.metrics import roc_auc_score

from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.meta.batch import TaskBatch
from textmeta.meta.learner import TaskLearner
from textmeta.nearest import index_corpora, task_embedding
from textmeta.sharing.store import load_adapter

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from general import training_corpora

WAYS, SHOTS, QUERIES = 5, 5, 5
OTHER_DRAWS = 4  # third number of the seed that texts of other classes are drawn by
FAMILIES = ("argkp", "crossner", "hatecheck", "exercise", "uci_sentences", "edos", "sgd", "onet", "chitchat smalltalk")
Rows = Iterator[tuple[str, str, np.ndarray]]  # a corpus, what is told of it, and shares


def scope(learner: TaskLearner, data_dir: Path, episodes: int) -> Rows:
    """Yield of each corpus the AUROC of the scope score, and of the largest probability."""
    for cell in cells_of(choose_corpora(data_dir), (SHOTS,)):
        corpus = cell.corpus
        count = len(corpus.class_names)
        if count < 3:
            continue
        sampler = EpisodeSampler(corpus, EpisodeSettings(min(WAYS, count - 1), SHOTS, QUERIES), EPISODE_SEED)
        own = []
        for number, episode in enumerate(sampler.take(episodes)):
            left = [label for label, name in enumerate(corpus.class_names) if name not in episode.class_names]
            rng = np.random.default_rng((EPISODE_SEED, number, OTHER_DRAWS))
            others = rng.permutation(np.concatenate([corpus.rows_of(label) for label in left]))
            others = others[: len(episode.query_texts)]
            inside = np.repeat([True, False], [len(episode.query_texts), len(others)])
            mixed = replace(episode, query_texts=(*episode.query_texts, *(corpus.texts[row] for row in others)))
            own.append([roc_auc_score(inside, score) for score in scope_scores(learner, mixed)])
        yield corpus.name, str(count), np.mean(own, 0)


def nearest(learner: TaskLearner, data_dir: Path, episodes: int) -> Rows:
    """Yield of each corpus how often a class of a relative is the nearest, among five, and would be at random."""
    corpora = training_corpora(data_dir)
    vectors = (learner.adapter.index or index_corpora(learner, corpora)).vectors
    for corpus in corpora:
        family = next((own for own in map(str.split, FAMILIES) if corpus.name.startswith(tuple(own))), ())
        others = {name: own for name, own in vectors.items() if name != corpus.name}
        kin = [name for name in others if name.startswith(tuple(family))]
        if not kin:
            continue
        known = np.concatenate(list(others.values()))
        of_kin = np.repeat([name in kin for name in others], [len(own) for own in others.values()])
        enough = [name for label, name in enumerate(corpus.class_names) if len(corpus.rows_of(label)) > SHOTS]
        hits = []
        for episode in EpisodeSampler(corpus.restrict(enough), EpisodeSettings(WAYS, SHOTS, 1), 0).take(episodes):
            task = learner.learn(TaskBatch.of_episodes([episode], "cpu"))
            order = np.argsort(-(task_embedding(task, episode.class_names).classes @ known.T), 1, kind="stable")
            near = of_kin[order[:, :5]]
            hits.append((near[:, 0].mean(), near.any(1).mean()))
        yield corpus.name, ", ".join(kin), np.array([*np.mean(hits, 0), of_kin.mean()])


TABLES = {  # what finds the rows, the head, episodes of a corpus
    "scope": (scope, ("corpus", "classes", "scope score", "largest probability"), 50),
    "nearest": (nearest, ("corpus", "its relatives", "nearest", "among 5", "at random"), 20),
}


def main() -> None:
    """Print a table, row by row."""
    parser = Options(__doc__)
    parser.add_argument("--table", choices=TABLES, required=True)
    parser.add_argument("--adapter", type=Path, default=SHIPPED)
    parser.add_argument("--episodes", type=int, help="of a corpus")
    arguments = parser.parsed()
    adapter, _ = load_adapter(arguments.adapter)
    find, head, episodes = TABLES[arguments.table]
    rows = find(TaskLearner(adapter.load_reader(), adapter), arguments.data_dir, arguments.episodes or episodes)
    print("|", " | ".join(head), "|\n" + "|---" * len(head) + "|")
    found = []
    for name, told, shares in rows:
        found.append(shares)
        print("|", " | ".join([name, told, *(f"{100 * share:.1f}" for share in shares)]), "|", flush=True)
    print("|", " | ".join([f"mean of {len(found)}", "", *(f"{100 * share:.1f}" for share in np.mean(found, 0))]), "|")


if __name__ == "__main__":
    main()
