"""Features for many tasks that take no inner step: these share LoRA's factors, so each text needs one forward."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from textmeta.data.episodes import Episode
from textmeta.meta.strengths import scaled_factors
from textmeta.meta.tasks import TaskBatch, support_rows, unprepared_batch
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import lora_factors

__all__ = ["SharedFeatures"]

TEXTS_AT_ONCE = 1024


class SharedFeatures:
    """The features of all texts of some episodes, at each strength of LoRA; every text goes through the encoder once.

    Args:
        encoder: makes features.
        parameters: with LoRA's factors.
        episodes: whose texts.
        strengths: S factors on LoRA's B.
    """

    def __init__(
        self,
        encoder: Encoder,
        parameters: Mapping[str, Tensor],
        episodes: Sequence[Episode],
        strengths: Sequence[float] = (1.0,),
    ) -> None:
        self._encoder, self._factors, self._strengths = encoder, lora_factors(parameters), tuple(strengths)
        self._rows: dict[str, int] = {}
        self._features = torch.empty(len(self._strengths), 0, encoder.hidden_size, device=encoder.device)
        self.add(episodes)

    def add(self, episodes: Sequence[Episode]) -> None:
        """Make features of the texts of further episodes, but for those that are there."""
        texts = list(dict.fromkeys(text for e in episodes for text in (*_support(e)[0], *e.query_texts)))
        missing = [text for text in texts if text not in self._rows]
        parts = [self._features]
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            prepared = self._encoder.prepare(missing[start : start + TEXTS_AT_ONCE])
            at_each = [scaled_factors(self._factors, s) for s in self._strengths]
            parts.append(torch.stack([self._encoder.features(prepared, factors) for factors in at_each]))
        self._features = torch.cat(parts, dim=1)
        self._rows |= {text: len(self._rows) + number for number, text in enumerate(missing)}

    def task(self, episode: Episode) -> tuple[TaskBatch, Tensor, Tensor]:
        """Return an episode's support set, a batch of one task, and features (S, n, d) of its rows and queries."""
        texts, labels = _support(episode)
        support = unprepared_batch(texts, labels, len(episode.support_texts), episode.ways, self._features.device)
        return support, self.of(texts), self.of(episode.query_texts)

    def of(self, texts: Sequence[str]) -> Tensor:
        """Return features (S, n, d) of texts."""
        return self._features[:, [self._rows[text] for text in texts]]


def _support(episode: Episode) -> tuple[list[str], list[int]]:
    return support_rows(episode.support_texts, episode.support_labels.tolist(), episode.label_names)
