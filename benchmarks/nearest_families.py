"""Whether the classes that a task is told to be near to are of a corpus of the same kind.

    python benchmarks/nearest_families.py --data-dir DATA

Some corpora label the same texts, or the same kind of text, in several ways: two sets of entity types, topics and
stances of the same arguments. For 5-way 5-shot tasks of each corpus that has such a relative in the adapter's index,
its own classes left out: is a class of a relative the nearest to a class of the task, or among the nearest five? Beside
it, what a class drawn at random would be.
"""

import sys
from pathlib import Path

import numpy as np
from choose import SHIPPED
from measure import Options

from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.meta.batch import TaskBatch
from textmeta.meta.learner import TaskLearner
from textmeta.nearest import index_corpora, task_embedding
from textmeta.sharing.store import load_adapter

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from general import training_corpora

FAMILIES = ("argkp", "crossner", "hatecheck", "exercise", "uci_sentences", "edos", "sgd", "onet", "chitchat smalltalk")
SHOTS, EPISODES, SEED = 5, 20, 0


def relatives(name: str, others: list[str]) -> list[str]:
    """Return those of the others that are of a corpus's family."""
    family = next((f.split() for f in FAMILIES if name.startswith(tuple(f.split()))), None)
    return [other for other in others if family and other != name and other.startswith(tuple(family))]


def main() -> None:
    """Print the table."""
    parser = Options(__doc__)
    parser.add_argument("--adapter", type=Path, default=SHIPPED)
    arguments = parser.parsed()
    adapter, _ = load_adapter(arguments.adapter)
    learner = TaskLearner(adapter.load_reader(), adapter)
    corpora = training_corpora(arguments.data_dir)
    vectors = (adapter.index or index_corpora(learner, corpora)).vectors
    print("| corpus | its relatives | nearest | among 5 | at random |\n|---|---|---|---|---|")
    found = []
    for corpus in corpora:
        if not (kin := relatives(corpus.name, list(vectors))):
            continue
        others = {name: own for name, own in vectors.items() if name != corpus.name}
        known = np.concatenate(list(others.values()))
        of_kin = np.repeat([name in kin for name in others], [len(own) for own in others.values()])
        enough = [name for label, name in enumerate(corpus.class_names) if len(corpus.rows_of(label)) > SHOTS]
        hits = []
        for episode in EpisodeSampler(corpus.restrict(enough), EpisodeSettings(5, SHOTS, 1), SEED).take(EPISODES):
            task = learner.learn(TaskBatch.of_episodes([episode], "cpu"))
            order = np.argsort(-(task_embedding(task, episode.class_names).classes @ known.T), 1, kind="stable")
            near = of_kin[order[:, :5]]
            hits.append((near[:, 0].mean(), near.any(1).mean()))
        first, five = np.mean(hits, 0)
        found.append((first, five, of_kin.mean()))
        print(f"| {corpus.name} | {', '.join(kin)} | {first:.0%} | {five:.0%} | {of_kin.mean():.1%} |", flush=True)
    first, five, chance = np.mean(found, 0)
    print(f"| mean of {len(found)} | | {first:.0%} | {five:.0%} | {chance:.1%} |")


if __name__ == "__main__":
    main()
