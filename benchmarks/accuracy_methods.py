"""The methods that the accuracy benchmark compares, and the table :data:`METHODS`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_cache import DiskCache, plain_features
from accuracy_episodes import Cell, Corpora, with_names
from accuracy_scores import score
from accuracy_setfit import LOGISTIC, has_setfit, sentence_probabilities, setfit_probabilities
from accuracy_training import EQUAL_TIME, RecipeSettings, Trained, Trainer, digest
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from textmeta.artifact.adapter import Adapter
from textmeta.artifact.folder import MANIFEST
from textmeta.artifact.locate import load_from
from textmeta.data.episodes import Episode
from textmeta.errors import AdapterError, TextMetaError
from textmeta.hub import HubAccess
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.evaluation import EpisodeScores, score_episodes
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS, class_mask
from textmeta.model.initialisation import head_scalars
from textmeta.model.lora import LoraSettings

__all__ = ["METHODS", "Bench", "Method", "Outcome"]

# Plain LoRA from a zero start: what the task learner does where nothing was meta-learned.
LORA = LoraSettings()
LORA_INNER = InnerLoopSettings(steps=10, adapt=("lora_A", "lora_B", "offset"))
SEED = 0  # of what is not meta-trained: LoRA's A, SetFit's pairs

# (support texts up to, episodes at most): always the first ones, so that differences are paired on those
Most = Sequence[tuple[int, int]]
ALL: Most = ((10**9, 10**9),)
ADAPTED: Most = ((60, 10**9), (125, 200), (10**9, 100))
LORA_MOST: Most = ((10, 10**9), (30, 200), (60, 100), (300, 20), (10**9, 5))
SETFIT_MOST: Most = ((5, 40), (10, 20), (30, 10), (60, 4))
CHECK_MOST: Most = ((30, 10),)

Variant = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a method made of episodes.

    Args:
        scores: of the episodes.
        told: what else a line says.
    """

    scores: EpisodeScores
    told: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """What all methods share.

    Args:
        corpora: of the folder.
        cache: of frozen features and states.
        trainer: meta-trains on folds.
        recipe: ours; its encoder is everybody's.
        protonet: the recipe of the ProtoNet baseline.
        seeds: of meta-training.
        adapters: names of adapters for unseen corpora, by method.
    """

    corpora: Corpora
    cache: DiskCache
    trainer: Trainer
    recipe: RecipeSettings
    protonet: RecipeSettings
    seeds: Sequence[int]
    adapters: dict[str, Sequence[str]]

    def __post_init__(self) -> None:
        """Let encoders and adapters be loaded once."""
        self.encoder = cache(self._encoder)
        self.adapters_of = cache(self._adapters)

    def _encoder(self, lora: LoraSettings) -> Encoder:
        return Encoder(self.recipe.encoder, lora)

    def _adapters(self, method: str) -> dict[str, tuple[str, Adapter]]:
        """Return hash of the folder, and adapter, by name; those that are not there are left out with a word."""
        found = {}
        for name in self.adapters.get(method, ()):
            try:
                adapter, where = load_from(name, access=HubAccess(local_files_only=True))
            except TextMetaError as error:
                print(f"no adapter {Path(name).name}: {method} is left out on unseen corpora ({type(error).__name__})")
                continue
            if adapter.weights_sha256 != self.encoder(adapter.lora).weights_sha256:
                raise AdapterError(f"the adapter {Path(name).name} belongs to another encoder than the recipe's")
            found[Path(name).name] = sha256((where.folder / MANIFEST).read_bytes()).hexdigest()[:12], adapter
        return found

    def trained(self, method: str, cell: Cell, seed: int) -> Trained:
        """Return what was trained on a fold."""
        assert cell.fold is not None
        parts = [self.corpora.part(cell.corpus, cell.fold, part) for part in ("train", "valid")]
        name = f"{cell.corpus}-{cell.fold}/{{}}-{seed}"
        recipe = self.recipe.with_steps(self.recipe.training.steps, seed)
        ours = self.trainer.train(name.format("textmeta"), self.encoder(recipe.lora), recipe, *parts)
        if method == "textmeta":
            return ours
        recipe, seconds = self.protonet.with_steps(self.protonet.training.steps, seed), ours.processor_seconds
        return self.trainer.train_as_long(
            name.format("protonet"), self.encoder(recipe.lora), recipe, *parts, seconds=seconds
        )

    def features(self, cell: Cell, episodes: Sequence[Episode]) -> tuple[dict[str, int], Tensor]:
        """Return the row of each text, and the frozen features; names of classes after the corpus's texts."""
        encoder = self.encoder(self.recipe.lora)
        texts, features = self.cache.features(encoder, self.corpora.corpus(cell.corpus))
        names = sorted({name for episode in episodes for name in episode.label_names or ()} - set(texts))
        if names:
            texts, features = [*texts, *names], torch.cat([features, plain_features(encoder, names)])
        return {text: row for row, text in enumerate(texts)}, features


def frozen(bench: Bench, cell: Cell, episodes: list[Episode], _: Variant) -> Outcome:
    """Prototypes of frozen features; a class's name, where given, is one more example."""
    row_of, features = bench.features(cell, episodes)
    start = time.monotonic()
    probabilities = frozen_probabilities(row_of, features, episodes)
    return Outcome(score(probabilities, episodes), _per_episode(start, episodes))


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
    return Outcome(score(probabilities, episodes), _per_episode(start, episodes))


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
    probabilities, fit = setfit_probabilities(bench.recipe.encoder, episodes, SEED)
    return Outcome(score(probabilities, episodes), _per_episode(start, episodes) | {"fit_seconds": round(fit, 3)})


def sentences(bench: Bench, cell: Cell, episodes: list[Episode], _: Variant) -> Outcome:
    """SentenceTransformer.encode and logistic regression: should equal ``logistic``."""
    start = time.monotonic()
    probabilities = sentence_probabilities(bench.recipe.encoder, episodes)
    return Outcome(score(probabilities, episodes), _per_episode(start, episodes))


def _adapted(
    bench: Bench, cell: Cell, episodes: list[Episode], encoder: Encoder, parameters: Any, inner: InnerLoopSettings
) -> Outcome:
    bench.cache.warm(encoder, bench.corpora.corpus(cell.corpus))
    start = time.monotonic()
    scores = score_episodes(encoder, parameters, episodes, inner, f"{cell.corpus} {cell.shots} shots")
    return Outcome(scores, _per_episode(start, episodes))


def _lora_start(encoder: Encoder) -> dict[str, Tensor]:
    return start_parameters(encoder.factor_shapes, LORA_INNER, encoder.hidden_size, SEED)


def _per_episode(start: float, episodes: Sequence[Episode]) -> dict[str, float]:
    return {"episode_seconds": round((time.monotonic() - start) / len(episodes), 4)}


def _nothing(bench: Bench, cell: Cell) -> list[Variant]:
    return [{}]


def _trained(method: str) -> Callable[[Bench, Cell], list[Variant]]:
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
        most: episodes at most, by the number of support texts; beyond the last number, the method is not run.
        parts: in which it is run; None for all.
        has_names: whether it uses label names, and so stands in another column.
    """

    work: Callable[[Bench, Cell, list[Episode], Variant], Outcome]
    variants: Callable[[Bench, Cell], list[Variant]] = _nothing
    most: Most = ALL
    parts: tuple[str, ...] | None = None
    has_names: bool = False

    def count(self, support: int, episodes: int) -> int:
        """Return how many of the episodes it is run on."""
        return next((min(most, episodes) for texts, most in self.most if support <= texts), 0)

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
    "protonet": Method(meta_trained, _trained("protonet"), ADAPTED),
    "textmeta": Method(meta_trained, _trained("textmeta"), ADAPTED),
    "frozen-names": Method(frozen, parts=_NAMED, has_names=True),
    "textmeta-names": Method(meta_trained, _trained("textmeta"), ADAPTED, _NAMED, has_names=True),
}  # fmt: skip
