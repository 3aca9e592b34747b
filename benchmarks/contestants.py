"""Adapters on the episodes of a cell: each text of a corpus is read once, and tasks are learned together."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import VARIANTS, WAYS, Cell, result_of
from runs import Line, Run
from torch import Tensor

from textmeta.data.episodes import Episode
from textmeta.encoder.pretrained import tensors_digest
from textmeta.encoder.token_states import Entering, TokenStateReader, TokenStates
from textmeta.heads.scope import scope_probability
from textmeta.meta.adapter import Adapter
from textmeta.meta.evaluation import in_parts
from textmeta.meta.learner import TaskLearner
from textmeta.sharing.store import load_adapter


class KnownStates:
    """Token states of the texts of one corpus, each read once."""

    def __init__(self, reader: TokenStateReader, factors: Mapping[str, Tensor]) -> None:
        self.reader, self.factors = reader, factors
        self.states: dict[str, Tensor] = {}

    @torch.no_grad()
    def know(self, texts: Sequence[str]) -> None:
        """Read the texts that are not known yet."""
        new = sorted({text for text in texts if text not in self.states})
        for start in range(0, len(new), 512):
            part = new[start : start + 512]
            found = self.reader.read(part, self.factors).unpadded()
            self.states.update({text: state.clone() for text, state in zip(part, found, strict=True)})

    def entering(self, texts: Sequence[str]) -> Iterator[Entering]:
        """Yield what enters the adapted layers, for steps on LoRA."""
        return self.reader.entering(texts)

    def read(
        self,
        texts: Sequence[str],
        factors: object = None,
        row_task: Tensor | None = None,
        entered: Sequence[Entering] | None = None,
    ) -> TokenStates:
        """Return the states of texts that are known."""
        if row_task is not None:
            return self.reader.read(texts, factors, row_task, entered)  # type: ignore[arg-type]
        return TokenStates.padded([self.states[text] for text in texts], overhead=512)


@dataclass(eq=False)
class Contestant:
    """An adapter, which is loaded when it is first needed, and what it has read of a corpus."""

    folder: Path  # of the adapter
    changes: Mapping[str, Any] = field(default_factory=dict)  # of its learner's settings
    precision: str = "no"  # of the encoder's matrix products
    cache: Path | None = None  # folder for the states of the frozen layers
    max_length: int | None = None  # tokens of a text, if not as many as the adapter says
    name: str = ""  # what results call it, by default as the folder
    suffix: str = ""  # what they add to the name of a variant, for what it does otherwise
    corpus: str = field(default="", init=False)
    states: KnownStates = field(init=False)  # of its texts

    def __post_init__(self) -> None:
        self.name = self.name or self.folder.name

    @cached_property
    def loaded(self) -> Adapter:
        """The adapter as it is in its folder."""
        return load_adapter(self.folder)[0]

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter, changed."""
        encoder = replace(self.loaded.encoder, max_length=self.max_length or self.loaded.encoder.max_length)
        return replace(self.loaded, encoder=encoder, learner=replace(self.loaded.learner, **self.changes))

    @cached_property
    def reader(self) -> TokenStateReader:
        """What reads its token states."""
        return self.adapter.load_reader(precision=self.precision)

    @cached_property
    def digest(self) -> str:
        """Hash of the adapter as it was loaded."""
        told = f"{tensors_digest(self.loaded.initialisation.tensors())} {self.loaded.learner}"
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def check_alone(self, lines: Sequence[Line], corpus: str | None = None) -> None:
        """Exit if lines, of a corpus, are of another adapter with this name."""
        for line in lines:
            own = line["key"].get("adapter") == self.name and corpus in (None, line["key"]["corpus"])
            if own and line["result"].get("adapter_sha256") != self.digest:
                raise SystemExit(f"the results have lines of another adapter named {self.name}: rename this one")

    def learner_of(self, cell: Cell, episodes: Sequence[Episode]) -> TaskLearner:
        """Return what learns the tasks of episodes, all of whose texts it has read."""
        if cell.corpus.name != self.corpus:
            self.corpus, self.states = cell.corpus.name, KnownStates(self.reader, self.adapter.initialisation.lora)
            if self.cache:
                self.reader.cache(cell.corpus.texts, folder=self.cache)
        texts = [[*e.support_texts, *e.query_texts, *e.unlabelled_texts, *(e.label_names or ())] for e in episodes]
        self.states.know([text for part in texts for text in part])
        if "lora" in self.adapter.learner.adapt:  # these steps read the support set again and again
            self.reader.cache([text for part in texts for text in part])
        return TaskLearner(self.states, self.adapter)

    def answers(self, cell: Cell, episodes: Sequence[Episode]) -> tuple[list[np.ndarray], float]:
        """Return the class probabilities of each episode's queries, and the seconds of an episode, its texts read."""
        learner = self.learner_of(cell, episodes)
        start, answers = time.perf_counter(), []
        for together in in_parts(episodes):
            answers += probabilities(learner, together)
        return answers, (time.perf_counter() - start) / len(episodes)


@torch.no_grad()
def probabilities(learner: TaskLearner, episodes: Sequence[Episode]) -> list[np.ndarray]:
    """Learn the tasks of episodes together, and classify their queries."""
    found = learner.answer_episodes(episodes).logits.double().softmax(-1).numpy()
    return [rows[: len(e.query_texts), : e.ways] for rows, e in zip(found, episodes, strict=True)]


@torch.no_grad()
def scope_scores(learner: TaskLearner, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """Return how far each query seems to be in scope, by the adapter's rule and by the largest class probability."""
    rule = learner.adapter.scope
    if rule is None:
        raise SystemExit("the adapter has no rule for what is out of scope")
    answers = learner.answer_episodes([episode])
    scores = scope_probability(rule.double(), answers.scope_inputs[0].double())
    return scores.numpy(), answers.logits[0].softmax(-1).amax(-1).numpy()


def contestant_runs(
    cells: Iterable[Cell], contestants: Sequence[Contestant], variants: Sequence[str], episodes: int, chunk: int
) -> Iterator[Run]:
    """Yield the runs that score adapters on episodes of each cell, in the variants that it can have, by chunks."""

    def work(cell: Cell, who: Contestant, variant: str, numbers: range) -> dict[str, Any]:
        own = [VARIANTS[variant](cell.episode(number), cell, number) for number in numbers]
        answers, seconds = who.answers(cell, own)
        return {**result_of(answers, own), "adapter_sha256": who.digest, "episode_seconds": round(seconds, 4)}

    for cell, who, first in product(cells, contestants, range(0, episodes, chunk)):
        numbers = range(first, min(first + chunk, episodes))
        for variant in variants:
            if "alone" in variant and cell.shots != 1:
                continue
            if "others" in variant and len(cell.corpus.class_names) <= WAYS:
                continue
            key = cell.key(variant + who.suffix, first, len(numbers)) | {"adapter": who.name}
            yield Run(key, partial(work, cell, who, variant, numbers))
