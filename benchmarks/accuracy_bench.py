"""What the methods of the accuracy benchmark share: corpora, encoders, cached features, models, adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from accuracy_cache import DiskCache, plain_features
from accuracy_episodes import OUTSIDE, Cell, Corpora
from accuracy_training import RecipeSettings, Trained, Trainer
from torch import Tensor

from textmeta.artifact.adapter import Adapter
from textmeta.artifact.folder import MANIFEST
from textmeta.artifact.locate import load_from
from textmeta.data.episodes import Episode
from textmeta.errors import AdapterError, TextMetaError
from textmeta.hub import HubAccess
from textmeta.meta.shared_features import SharedFeatures
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import Parameters
from textmeta.model.lora import LoraSettings

__all__ = ["Bench", "ending"]


def ending(adapter: str) -> str:
    """Return what a folder or name of an adapter ends in, by which lines and tables know it."""
    return Path(adapter).name


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
        device: that encoders run on.
    """

    corpora: Corpora
    cache: DiskCache
    trainer: Trainer
    recipe: RecipeSettings
    protonet: RecipeSettings
    seeds: Sequence[int]
    adapters: dict[str, Sequence[str]]
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Let encoders and adapters be loaded once."""
        self.encoder = cache(self._encoder)
        self.adapters_of = cache(self._adapters)
        self._growing: tuple[str, Parameters, SharedFeatures] | None = None

    def _encoder(self, lora: LoraSettings) -> Encoder:
        return Encoder(self.recipe.encoder, lora, self.device)

    def _adapters(self, method: str) -> dict[str, tuple[str, Adapter]]:
        """Return hash of the folder, and adapter, by name; those that are not there are left out with a word."""
        found = {}
        for name in self.adapters.get(method, ()):
            try:
                adapter, where = load_from(name, access=HubAccess(local_files_only=True))
            except TextMetaError as error:
                print(f"no adapter {ending(name)}: {method} is left out on unseen corpora ({type(error).__name__})")
                continue
            adapter = replace(adapter, parameters={n: v.to(self.device) for n, v in adapter.parameters.items()})
            if adapter.weights_sha256 != self.encoder(adapter.lora).weights_sha256:
                raise AdapterError(f"the adapter {ending(name)} belongs to another encoder than the recipe's")
            found[ending(name)] = sha256((where.folder / MANIFEST).read_bytes()).hexdigest()[:12], adapter
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

    def of_fold(self, corpus: str, fold: str, seed: int) -> SharedFeatures:
        """Return ours of all test texts of a fold, and of those of no class, each through the encoder once."""
        cell = Cell("scope", corpus, fold, 0, 1, 1)
        sources = [self.corpora.part(corpus, fold, "test")]
        if self.corpora.has_outside(corpus):
            sources.append(self.corpora.outside(corpus))
        encoder, result = self.encoder(self.recipe.lora), self.trained("textmeta", cell, seed).result
        for source in (self.corpora.corpus(corpus), *sources[1:]):
            self.cache.warm(encoder, source)
        texts = tuple(text for source in sources for text in source.texts)
        whole = Episode(corpus, ("all",), (), np.empty(0, int), texts, np.full(len(texts), OUTSIDE))
        shared = self.growing(corpus, encoder, result.parameters, result.inner.strengths)
        with torch.no_grad():
            shared.add([whole])
        return shared

    def growing(self, corpus: str, encoder: Encoder, parameters: Parameters, strengths: tuple) -> SharedFeatures:
        """Return the features that parameters make of a corpus's texts, to be added to: cells share their texts."""
        if self._growing is None or self._growing[0] != corpus or self._growing[1] is not parameters:
            self._growing = corpus, parameters, SharedFeatures(encoder, parameters, (), strengths)
        return self._growing[2]

    def features(self, cell: Cell, episodes: Sequence[Episode]) -> tuple[dict[str, int], Tensor]:
        """Return the row of each text, and the frozen features; names of classes after the corpora's texts."""
        encoder = self.encoder(self.recipe.lora)
        known = [self.cache.features(encoder, corpus) for corpus in self.corpora.sources(cell)]
        texts, features = [text for part, _ in known for text in part], torch.cat([part for _, part in known])
        names = sorted({name for episode in episodes for name in episode.label_names or ()} - set(texts))
        if names:
            texts, features = [*texts, *names], torch.cat([features, plain_features(encoder, names)])
        return {text: row for row, text in enumerate(texts)}, features
