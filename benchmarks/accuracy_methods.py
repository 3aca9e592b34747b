"""The methods that the accuracy benchmark compares, and the table :data:`METHODS`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from accuracy_bench import Bench
from accuracy_episodes import Cell, with_names
from accuracy_scores import ScopeScores, score, to_result
from accuracy_setfit import LOGISTIC, has_setfit, sentence_probabilities, setfit_probabilities
from accuracy_training import EQUAL_TIME, digest
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from textmeta.data.episodes import Episode
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.evaluation import EpisodeScores, score_episodes
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS, class_mask
from textmeta.model.initialisation import head_scalars
from textmeta.model.lora import LoraSettings

__all__ = ["METHODS", "Method", "Outcome", "Variant", "per_episode", "trained_variants"]

# Plain LoRA from a zero start: what the task learner does where nothing was meta-learned.
LORA = LoraSettings()
LORA_INNER = InnerLoopSettings(steps=10, adapt=("lora_A", "lora_B", "offset"))
SEED = 0  # of what is not meta-trained: LoRA's A, SetFit's pairs

# (support texts up to, episodes at most): always the first ones, so that differences are paired on those
Most = Sequence[tuple[int, int]]
ALL: Most = ((10**9, 10**9),)
LORA_MOST: Most = ((10, 100), (30, 40), (60, 10))
SETFIT_MOST: Most = ((5, 20), (10, 10), (30, 6), (60, 6))
CHECK_MOST: Most = ((30, 10),)
WHOLE_TIMES = 3  # so many times as many of an unseen corpus, which has one cell where others have five folds

Variant = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a method made of episodes.

    Args:
        scores: of the episodes.
        told: what else a line says.
    """

    scores: EpisodeScores | ScopeScores
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, Any]:
        """All that a line says came out."""
        scores = self.scores
        return {**(scores.to_result() if isinstance(scores, ScopeScores) else to_result(scores)), **self.told}


def frozen(bench: Bench, cell: Cell, episodes: list[Episode], _: Variant) -> Outcome:
    """Prototypes of frozen features; a class's name, where given, is one more example."""
    row_of, features = bench.features(cell, episodes)
    start = time.monotonic()
    probabilities = frozen_probabilities(row_of, features, episodes)
    return Outcome(score(probabilities, episodes), per_episode(start, episodes))


def frozen_probabilities(row_of: dict[str, int], features: Tensor, episodes: list[Episode]) -> list[np.ndarray]:
    """Return class probabilities (queries, ways) of episodes that all have as many classes and texts."""
    ways, head = episodes[0].ways, HEADS["prototype"]
    scalars = head_scalars(start_parameters({}, InnerLoopSettings(steps=0), features.shape[1]))
    names = range(ways if episodes[0].label_names else 0)
    found = []
    for first in range(0, len(episodes), 32):
        part = episodes[first : first + 32]
        support = torch.tensor([[row_of[t] for t in (*e.support_texts, *(e.label_names or ()))] for e in part])
        labels = torch.tensor([[*e.support_labels.tolist(), *names] for e in part])
        query = features[torch.tensor([[row_of[text] for text in e.query_texts] for e in part])]
        offset = features.new_zeros(len(part), ways, features.shape[1])
        weights = head.weights(features[support], labels, offset, scalars)
        logits = head.logits(query, weights, scalars, class_mask(torch.full((len(part),), ways)))
        found += list(logits.double().softmax(-1).numpy())
    return found


def logistic(bench: Bench, cell: Cell, episodes: list[Episode], _: Variant) -> Outcome:
    """Logistic regression on frozen features."""
    row_of, tensor = bench.features(cell, episodes)
    features, start, probabilities = tensor.numpy(), time.monotonic(), []
    for episode in episodes:
        head = LogisticRegression(**LOGISTIC)
        head.fit(features[[row_of[text] for text in episode.support_texts]], episode.support_labels)
        probabilities.append(head.predict_proba(features[[row_of[text] for text in episode.query_texts]]))
    return Outcome(score(probabilities, episodes), per_episode(start, episodes))


def lora(bench: Bench, cell: Cell, episodes: list[Episode], _: Variant) -> Outcome:
    """Plain LoRA from a zero start, fine-tuned on the support set."""
    encoder = bench.encoder(LORA)
    return _adapted(bench, cell, episodes, encoder, _lora_start(encoder), LORA_INNER)


def meta_trained(bench: Bench, cell: Cell, episodes: list[Episode], variant: Variant) -> Outcome:
    """What was meta-trained on the fold's training classes; on an unseen corpus, an adapter from elsewhere."""
    method = variant["model"]
    if cell.fold is None:
        _, adapter = bench.adapters_of(method)[variant["adapter"]]
        encoder = bench.encoder(adapter.lora)
        return _adapted(bench, cell, episodes, encoder, adapter.parameters, adapter.inner)
    trained = bench.trained(method, cell, variant["seed"])
    encoder = bench.encoder((bench.recipe if method == "textmeta" else bench.protonet).lora)
    outcome = _adapted(bench, cell, episodes, encoder, trained.result.parameters, trained.result.inner)
    return Outcome(outcome.scores, outcome.told | trained.told)


def setfit(bench: Bench, cell: Cell, episodes: list[Episode], _: Variant) -> Outcome:
    """SetFit by its own defaults."""
    start = time.monotonic()
    probabilities, fit = setfit_probabilities(bench.recipe.encoder, episodes, SEED, bench.device)
    return Outcome(score(probabilities, episodes), per_episode(start, episodes) | {"fit_seconds": round(fit, 3)})


def sentences(bench: Bench, cell: Cell, episodes: list[Episode], _: Variant) -> Outcome:
    """SentenceTransformer.encode and logistic regression: should equal ``logistic``."""
    start = time.monotonic()
    probabilities = sentence_probabilities(bench.recipe.encoder, episodes, bench.device)
    return Outcome(score(probabilities, episodes), per_episode(start, episodes))


def _adapted(
    bench: Bench, cell: Cell, episodes: list[Episode], encoder: Encoder, parameters: Any, inner: InnerLoopSettings
) -> Outcome:
    bench.cache.warm(encoder, bench.corpora.corpus(cell.corpus))
    shared = bench.growing(cell.corpus, encoder, parameters, inner.strengths)
    start = time.monotonic()
    scores = score_episodes(encoder, parameters, episodes, inner, f"{cell.corpus} {cell.shots} shots", shared)
    return Outcome(scores, per_episode(start, episodes))


def _lora_start(encoder: Encoder) -> dict[str, Tensor]:
    start = start_parameters(encoder.factor_shapes, LORA_INNER, encoder.hidden_size, SEED)
    return {name: value.to(encoder.device) for name, value in start.items()}


def per_episode(start: float, episodes: Sequence[Episode]) -> dict[str, float]:
    """Return what a line says of the time since a start."""
    return {"episode_seconds": round((time.monotonic() - start) / len(episodes), 4)}


def _nothing(bench: Bench, cell: Cell) -> list[Variant]:
    return [{}]


def trained_variants(method: str) -> Callable[[Bench, Cell], list[Variant]]:
    """Return what makes the variants of a meta-trained method: its seeds, or its adapters."""

    def variants(bench: Bench, cell: Cell) -> list[Variant]:
        if cell.fold is None:
            adapters = bench.adapters_of(method)
            return [{"model": method, "adapter": name, "sha256": known} for name, (known, _) in adapters.items()]
        recipe: Variant = {"recipe": bench.recipe.digest}
        if method == "protonet":
            recipe = {"recipe": bench.protonet.rule_digest, "rule": EQUAL_TIME, "as": bench.recipe.digest}
        return [{"model": method, "seed": seed, **recipe} for seed in bench.seeds]

    return variants


@dataclass(frozen=True)
class Method:
    """A row of :data:`METHODS`.

    Args:
        work: scores episodes.
        variants: what else a run's key holds, once for each model that is trained; none, where there is no model.
        most: episodes at most, by the number of support texts; beyond the last number, the method is not run. Of an
            unseen corpus, :data:`WHOLE_TIMES` as many.
        parts: in which it is run; None for all.
        has_names: whether it uses label names, and so stands in another column.
    """

    work: Callable[[Bench, Cell, list[Episode], Variant], Outcome]
    variants: Callable[[Bench, Cell], list[Variant]] = _nothing
    most: Most = ALL
    parts: tuple[str, ...] | None = None
    has_names: bool = False

    def count(self, support: int, cell: Cell) -> int:
        """Return how many of a cell's episodes, each of so many support texts, it is run on."""
        times = WHOLE_TIMES if cell.part == "corpora" else 1
        return next((min(times * most, cell.episodes) for texts, most in self.most if support <= texts), 0)

    def run(self, bench: Bench, cell: Cell, episodes: list[Episode], variant: Variant) -> Outcome:
        """Score episodes, with label names where it uses them."""
        return self.work(bench, cell, with_names(episodes) if self.has_names else episodes, variant)


_NAMED = ("classes", "corpora", "curve")
METHODS = {
    "frozen": Method(frozen),
    "logistic": Method(logistic),
    "sentence-transformers": Method(
        sentences, lambda b, c: [{"sentence_transformers": version("sentence-transformers")}] * has_setfit(),
        CHECK_MOST, ("classes", "corpora"),
    ),
    "lora": Method(
        lora, lambda b, c: [{"settings": digest([asdict(LORA), asdict(LORA_INNER)]), "seed": SEED}], LORA_MOST
    ),
    "setfit": Method(
        setfit, lambda b, c: [{"setfit": version("setfit"), "seed": SEED}] * has_setfit(), SETFIT_MOST
    ),
    "protonet": Method(meta_trained, trained_variants("protonet")),
    "textmeta": Method(meta_trained, trained_variants("textmeta")),
    "frozen-names": Method(frozen, parts=_NAMED, has_names=True),
    "textmeta-names": Method(meta_trained, trained_variants("textmeta"), parts=_NAMED, has_names=True),
}  # fmt: skip
