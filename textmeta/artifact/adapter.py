"""An adapter in memory: everything that an adapter folder holds."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from textmeta.artifact import peft_files
from textmeta.errors import AdapterError, EncoderError, HubError, TextMetaError
from textmeta.hub import HubAccess
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.task_learner import LearnedTask
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import Parameters, lora_factors
from textmeta.model.lora import LoraSettings
from textmeta.model.task_encoder import CENTRE
from textmeta.tasks import KnownTasks, TaskEmbedding

__all__ = ["HEAD", "PROBES", "Adapter", "FittedHead", "probe"]

logger = logging.getLogger(__name__)

HEAD = "classifier.safetensors"  # the file of a fitted head
PROBES = ("I lost my card on 24 December.", "What's the weather like?", "Übersetzen Sie das, s'il vous plaît! 你好")
LIKENESS = 0.999  # cosine: other machines and bfloat16 come closer, a word that became another does not
LIBRARIES = ("textmeta", "torch", "transformers", "peft")


@dataclass(frozen=True)
class FittedHead:
    """What ``fit`` made of one task.

    Args:
        factors: every LoRA factor by name, (out, in).
        weights: (C, d), the head.
        classes: labels in the order of the head's rows.
        support: text and class (index) of each example that it was fitted on; None where they are not kept.
        temperature: (), the task's.
        task: the task's embedding, where the adapter has a task encoder.
        scope: (4,), the rule for what is out of the task's scope, where the adapter has one.
    """

    factors: dict[str, Tensor]
    weights: Tensor
    classes: list[Any]
    support: list[tuple[str, int]] | None = None
    temperature: Tensor = field(kw_only=True)
    task: TaskEmbedding | None = None
    scope: Tensor | None = None

    @classmethod
    def of(
        cls,
        learned: LearnedTask,
        classes: list[Any],
        support: Sequence[tuple[str, Any]] | None = None,
        task: TaskEmbedding | None = None,
    ) -> "FittedHead":
        """Make the head of what was learned; ``support`` are texts with their labels."""
        index = {label: number for number, label in enumerate(classes)}
        rows = None if support is None else [(text, index[label]) for text, label in support]
        return cls(
            learned.factors, learned.weights, classes, rows, task, learned.scope, temperature=learned.temperature
        )

    @property
    def examples(self) -> list[tuple[str, Any]] | None:
        """The support set, text and label each; None where it is not kept."""
        return None if self.support is None else [(text, self.classes[index]) for text, index in self.support]

    def learned(self, device: torch.device) -> LearnedTask:
        """Return what ``fit`` had learned, on a device."""
        return LearnedTask(
            {name: value.to(device) for name, value in self.factors.items()},
            self.weights.to(device),
            self.temperature.to(device),
            None if self.scope is None else self.scope.to(device),
        )


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder.

    Args:
        parameters: the initialisation.
        inner: the inner loop that it was learned for.
        encoder: settings of the encoder that it belongs to.
        lora: settings of the LoRA.
        weights_sha256: hash of the encoder's weights (:func:`~textmeta.model.pretrained.weights_digest`).
        commit: of the encoder's repository, where it came from the Hub.
        record: how it was trained.
        fitted: of a fitted classifier.
        versions: of the libraries that it was written with.
        probe: what the encoder made of some texts, to know it by (:func:`probe`).
        known_tasks: index of the tasks that it was trained on, where it has one.
    """

    parameters: Parameters
    inner: InnerLoopSettings
    encoder: EncoderSettings
    lora: LoraSettings
    weights_sha256: str
    commit: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    fitted: FittedHead | None = None
    versions: dict[str, str | None] = field(default_factory=lambda: {name: version(name) for name in LIBRARIES})
    probe: Tensor = field(default_factory=lambda: torch.empty(0))
    known_tasks: KnownTasks | None = None

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        parameters: Mapping[str, Tensor],
        inner: InnerLoopSettings,
        record: Mapping[str, Any],
        fitted: FittedHead | None = None,
        known_tasks: KnownTasks | None = None,
    ) -> "Adapter":
        """Make the adapter of an encoder in hand; see the class's arguments."""
        return cls(
            parameters=dict(parameters),
            inner=inner,
            encoder=encoder.settings,
            lora=encoder.lora,
            weights_sha256=encoder.weights_sha256,
            commit=encoder.commit,
            record=dict(record),
            fitted=fitted,
            probe=probe(encoder, parameters),
            known_tasks=known_tasks,
        )

    @property
    def feature_size(self) -> int | None:
        """Length of the features that the task encoder is for; None, where there is none."""
        return None if self.inner.conditioning is None else self.parameters[CENTRE].numel()

    def load_encoder(
        self, device: str | torch.device = "cpu", model: str | None = None, access: HubAccess | None = None
    ) -> Encoder:
        """Load the encoder that this adapter belongs to.

        Args:
            device: where it runs.
            model: where to load it from, if not from the id or folder that the adapter names.
            access: how the Hub is reached.

        Raises:
            AdapterError: if its weights are not those that the adapter was trained on.
            EncoderError: if it cannot be loaded.
        """
        try:
            encoder = self._any_encoder(device, model, access)
            self._check(encoder)
        except TextMetaError:
            raise
        except Exception as error:  # an encoder may be anybody's, and its configuration say anything
            raise EncoderError(
                f"the encoder {model or self.encoder.model!r} cannot be used: {type(error).__name__}: {error}"
            ) from error
        # it is the encoder that the adapter names, wherever this copy of it came from
        encoder.settings, encoder.commit = self.encoder, self.commit
        return encoder

    def _check(self, encoder: Encoder) -> None:
        """Check that this is the adapter's encoder, and that the adapter fits it."""
        if encoder.weights_sha256 != self.weights_sha256:
            raise AdapterError(
                f"the adapter belongs to {self.encoder.model} with weights {self.weights_sha256[:12]}…, but the "
                f"weights of {encoder.settings.model} are {encoder.weights_sha256[:12]}…"
            )
        shapes = encoder.factor_shapes
        given = {name: tuple(value.shape) for name, value in lora_factors(self.parameters).items()}
        if shapes != given:
            wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
            raise AdapterError(
                f"{peft_files.WEIGHTS}: {wrong[0]} has shape {given.get(wrong[0])}, expected "
                f"{shapes.get(wrong[0])} ({len(wrong)} such tensors)"
            )
        if self.fitted is not None and self.fitted.weights.shape[1] != encoder.hidden_size:
            raise AdapterError(
                f"{HEAD}: weights have {self.fitted.weights.shape[1]} columns, but features of "
                f"{encoder.settings.model} have {encoder.hidden_size}"
            )
        if CENTRE in self.parameters and len(self.parameters[CENTRE]) != encoder.hidden_size:
            raise AdapterError(
                f"textmeta.safetensors: its task encoder takes features of {len(self.parameters[CENTRE])} numbers, but "
                f"those of {encoder.settings.model} have {encoder.hidden_size}"
            )
        self._check_probe(encoder)

    def _check_probe(self, encoder: Encoder) -> None:
        """Check that the encoder makes of some texts what it made when the adapter was written.

        Weights are not all that matters: a tokenizer or a configuration that was changed would go unnoticed.
        """
        found = probe(encoder, self.parameters)
        likeness = (found * self.probe).sum(1).min() if found.shape == self.probe.shape else torch.tensor(0.0)
        if not likeness >= LIKENESS:  # which NaN is not, either
            raise AdapterError(
                f"{encoder.settings.model} has the adapter's weights, but makes other features of the same texts "
                f"(cosine {likeness:.3f}, expected over {LIKENESS}): its tokenizer or configuration has changed"
            )

    def _any_encoder(self, device: str | torch.device, model: str | None, access: HubAccess | None) -> Encoder:
        """Load the encoder; of one on the Hub the commit that the adapter was trained on, if it can be had."""
        if model:
            return Encoder(replace(self.encoder, model=model, revision=None), self.lora, device, access=access)
        pinned = replace(self.encoder, revision=self.commit or self.encoder.revision)
        try:
            return Encoder(pinned, self.lora, device, access=access)
        except EncoderError as error:
            if self.commit is None or not isinstance(error.__cause__, HubError):
                raise
            # any other copy will do if it is the same, and the caller compares
            logger.warning("%s; looking for the encoder at revision %s", error, self.encoder.revision or "main")
            return Encoder(self.encoder, self.lora, device, access=access)


def probe(encoder: Encoder, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the features (n, hidden) that the start makes of some fixed texts."""
    factors = {name: value.to(encoder.device, torch.float32) for name, value in lora_factors(parameters).items()}
    with torch.no_grad():
        return encoder.features(encoder.prepare(PROBES, remember=False), factors).cpu()
