"""An adapter: all that meta-training makes, with the identity of the encoder that it was made for."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.pretrained import Pretrained, load_pretrained, tensors_digest
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, EncoderError, HubError, TextMetaError, logger
from textmeta.files import at_home, is_folder
from textmeta.heads.pooling import pool
from textmeta.hub import HubAccess
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.shared import shared

PROBES = ("I lost my card on 24 December.", "What's the weather like?", "Übersetzen Sie das, s'il vous plaît! 你好")
PROBE_LENGTH = 64  # tokens, which is more than any of them has
LIKENESS = 0.999  # cosine: other machines and bfloat16 come closer, a word that became another does not
LIBRARIES = ("textmeta", "torch", "transformers", "peft")


@dataclass(frozen=True, eq=False)
class ClassIndex:
    """The classes of the training corpora, to compare new tasks with; no text."""

    classes: Mapping[str, tuple[str, ...]]  # corpus → names of its classes
    vectors: Mapping[str, np.ndarray]  # corpus → (classes, d) float32, of length 1, as those of a TaskEmbedding


@dataclass(frozen=True)
class Adapter:
    """What meta-training makes, and a classifier takes. It is never changed: a copy is the adapter itself."""

    encoder: EncoderSettings
    weights_sha256: str  # of the encoder
    lora: LoraSettings
    learner: LearnerSettings
    initialisation: Initialisation  # what was learned by gradient: where tasks start
    probe: Tensor  # (3, V·d), what the encoder made of some texts, to know it by
    scope: Tensor | None = None  # (8,) rule of heads.scope.scope_probability, set after training; None where none was
    commit: str | None = None  # of the encoder's repository, where it came from the Hub
    index: ClassIndex | None = None  # of the classes that it was trained on
    record: Mapping[str, Any] = field(default_factory=dict)  # how it was trained
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in LIBRARIES})
    prompt: str = ""  # what is put before each text
    first_token: bool = False  # whether the last view is the state of the first token alone, not pooled

    @classmethod
    def of(cls, reader: TokenStateReader, learner: LearnerSettings, initialisation: Initialisation) -> "Adapter":
        """Make the adapter of an encoder in hand, without a rule for what is out of scope yet."""
        encoder = reader.encoder
        return cls(
            encoder=encoder.settings,
            weights_sha256=encoder.weights_sha256,
            lora=encoder.lora,
            learner=replace(learner, layers=reader.layers),
            initialisation=initialisation,
            probe=_probe(reader, initialisation),
            commit=encoder.commit,
            prompt=encoder.prompt,
            first_token=encoder.first_token,
        )

    def load_reader(
        self,
        *,
        device: str | torch.device = "cpu",
        precision: str = "no",
        model: str | None = None,
        access: HubAccess | None = None,
        pretrained: Pretrained | None = None,
    ) -> TokenStateReader:
        """Load the encoder that this adapter belongs to, and return what reads its token states.

        It comes from ``model``, by default the id or folder that the adapter names, or it has been loaded
        (``pretrained``). AdapterError if its weights are not those that the adapter was trained on, or it makes other
        features; EncoderError if it cannot be loaded.
        """
        name = at_home(model or self.encoder.model)
        with as_encoder_errors(name):
            loaded = pretrained or self.load_encoder(model, access)
            if loaded.weights_sha256 != self.weights_sha256:
                own = f"belongs to {self.encoder.model} with weights {self.weights_sha256[:12]}…"
                raise AdapterError(f"the adapter {own}, but the weights of {name} are {loaded.weights_sha256[:12]}…")
            settings = replace(self.encoder, model=name, revision=None)
            encoder = Encoder(settings, self.lora, device, precision, access, loaded)
            encoder.prompt, encoder.first_token = self.prompt, self.first_token
            reader = TokenStateReader(encoder, self.learner.layers)
            shape = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, self.learner, seed=0)
            shape.with_tensors(self.initialisation.tensors())  # says which tensor does not fit
            # weights are not all that matters: a tokenizer or a configuration that was changed would go unnoticed
            found = _probe(reader, self.initialisation)
            likeness = (found * self.probe).sum(1).min() if found.shape == self.probe.shape else torch.tensor(0.0)
            if not likeness >= LIKENESS:  # which NaN is not, either
                told = "has the adapter's weights, but makes other features of the same texts"
                why = f"(cosine {likeness:.3f}, expected over {LIKENESS}): its tokenizer or configuration has changed"
                raise AdapterError(f"{name} {told} {why}")
            # wherever this copy of it came from
            encoder.settings, encoder.commit = self.encoder, self.commit
            return reader

    def load_encoder(self, model: str | None = None, access: HubAccess | None = None) -> Pretrained:
        """Load an encoder for :meth:`load_reader`: its own if that is on this machine, else what the Hub has."""
        name, branch = at_home(model or self.encoder.model), self.encoder.revision
        if model or is_folder(name):
            return load_pretrained(name, None, access)
        here = replace(access or HubAccess(), local_files_only=True)
        for revision in dict.fromkeys((self.commit or branch, branch)):
            with suppress(EncoderError):
                loaded = load_pretrained(name, revision, here)
                if loaded.weights_sha256 == self.weights_sha256:
                    return loaded
        try:
            return load_pretrained(name, self.commit or branch, access)
        except EncoderError as error:
            if self.commit is None or type(error.__cause__) is not HubError:  # but one that cannot be reached
                raise
            # any other copy will do if it is the same, and the caller compares
            logger.warning("%s; looking for the encoder at revision %s", error, branch or "main")
            return load_pretrained(name, branch, access)

    def to(self, device: torch.device) -> "Adapter":
        """Return the same adapter with its tensors on a device."""
        init = self.initialisation
        moved = init.with_tensors({name: value.to(device) for name, value in init.tensors().items()})
        return replace(self, initialisation=moved, scope=None if self.scope is None else self.scope.to(device))

    @cached_property
    def digest(self) -> str:
        """Sha256 over all of it; two of the same are one."""
        vectors = {} if self.index is None else self.index.vectors
        more = {"probe": self.probe, **{f"index.{name}": torch.from_numpy(value) for name, value in vectors.items()}}
        if self.scope is not None:
            more["scope"] = self.scope
        told: list[Any] = [asdict(part) for part in (self.encoder, self.lora, self.learner)]
        told += [self.weights_sha256, self.commit, self.prompt, self.first_token, self.record, self.versions]
        told += [self.index and self.index.classes, tensors_digest({**more, **self.initialisation.tensors()})]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=repr).encode()).hexdigest()

    def __deepcopy__(self, memo: object) -> "Adapter":
        return self

    def __reduce__(self) -> tuple[Callable[..., "Adapter"], tuple[dict[str, Any]]]:
        own = self.to(torch.device("cpu"))
        return _unpickled, ({field.name: getattr(own, field.name) for field in fields(own)},)


@contextmanager
def as_encoder_errors(model: str) -> Iterator[None]:
    """Turn every error into one of ours: an encoder may be anybody's, and its configuration say anything."""
    try:
        yield
    except TextMetaError:
        raise
    except Exception as error:
        raise EncoderError(f"the encoder {model!r} cannot be used: {type(error).__name__}: {error}") from error


def _unpickled(given: dict[str, Any]) -> Adapter:
    made = Adapter(**given)
    return shared(made.digest, lambda: made)


@torch.no_grad()
def _probe(reader: TokenStateReader, initialisation: Initialisation) -> Tensor:
    """Return (3, V·d), of length 1: the mean-pooled views of some fixed texts, with the adapter's LoRA."""
    device = reader.encoder.device
    factors = {name: value.detach().to(device) for name, value in initialisation.lora.items()}
    length = max(reader.encoder.settings.max_length, PROBE_LENGTH)  # whole, however texts are cut
    whole = TokenStateReader(reader.encoder.with_length(length), reader.layers)
    views = pool(whole.read(PROBES, factors), torch.zeros_like(initialisation.queries, device=device))
    joined: Tensor = views.flatten(1) / len(reader.layers) ** 0.5
    return joined.float().cpu()
