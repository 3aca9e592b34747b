"""How well texts of a task's classes are told from texts of other classes of the same corpus.

    python benchmarks/out_of_scope.py --data-dir DATA

AUROC in percent, mean over episodes, on every choose corpus of three classes or more: 5 shots, at most five of the
classes and at least one left out, 5 queries a class and as many texts of the classes that are left out. Beside the
scope score it is that of the largest class probability.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from cells import EPISODE_SEED, cells_of, choose_corpora
from choose import SHIPPED
from contestants import scope_scores
from measure import Options
from sklearn.metrics import roc_auc_score

from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.meta.learner import TaskLearner
from textmeta.sharing.store import load_adapter

WAYS, SHOTS, QUERIES = 5, 5, 5
OTHER_DRAWS = 4  # third number of the seed that texts of other classes are drawn by


def main() -> None:
    """Print the table."""
    parser = Options(__doc__)
    parser.add_argument("--adapter", type=Path, default=SHIPPED)
    parser.add_argument("--episodes", type=int, default=50)
    arguments = parser.parsed()
    adapter, _ = load_adapter(arguments.adapter)
    learner = TaskLearner(adapter.load_reader(), adapter)
    print("| corpus | classes | scope score | largest probability |\n|---|---|---|---|")
    found = []
    for cell in cells_of(choose_corpora(arguments.data_dir), (SHOTS,)):
        corpus = cell.corpus
        count = len(corpus.class_names)
        if count < 3:
            continue
        sampler = EpisodeSampler(corpus, EpisodeSettings(min(WAYS, count - 1), SHOTS, QUERIES), EPISODE_SEED)
        own = []
        for number, episode in enumerate(sampler.take(arguments.episodes)):
            left = [label for label, name in enumerate(corpus.class_names) if name not in episode.class_names]
            rng = np.random.default_rng((EPISODE_SEED, number, OTHER_DRAWS))
            others = rng.permutation(np.concatenate([corpus.rows_of(label) for label in left]))
            others = others[: len(episode.query_texts)]
            inside = np.repeat([True, False], [len(episode.query_texts), len(others)])
            mixed = replace(episode, query_texts=(*episode.query_texts, *(corpus.texts[row] for row in others)))
            own.append([roc_auc_score(inside, score) for score in scope_scores(learner, mixed)])
        found.append(100 * np.mean(own, 0))
        print(f"| {corpus.name} | {count} | {found[-1][0]:.1f} | {found[-1][1]:.1f} |", flush=True)
    scope, largest = np.mean(found, 0)
    print(f"| mean of {len(found)} | | {scope:.1f} | {largest:.1f} |")


if __name__ == "__main__":
    main()
