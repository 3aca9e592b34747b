"""Adapters as the start of meta-training: textmeta's own, and LoRA adapters that PEFT wrote."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from textmeta.artifact import peft_files
from textmeta.artifact.folder import MANIFEST
from textmeta.artifact.locate import load_from, locate
from textmeta.errors import AdapterError
from textmeta.files import is_folder
from textmeta.hub import HubAccess
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import LORA, Parameters, lora_factors
from textmeta.model.lora import LoraSettings

__all__ = ["Start", "load_start"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """An adapter to start meta-training from.

    Args:
        name: that it was loaded by; of a folder its last part, to be told to others.
        parameters: an initialisation, or its LoRA factors alone.
        lora: settings that the encoder must have.
        base_model: the encoder that it was trained on, as it says.
        weights_sha256: hash of that encoder's weights, which adapters of others do not tell.
        commit: of a repository on the Hub.
    """

    name: str
    parameters: Parameters
    lora: LoraSettings
    base_model: str
    weights_sha256: str | None = None
    commit: str | None = None

    @property
    def told(self) -> dict[str, str]:
        """What a record says of it."""
        return {"start": self.name, **({"start_revision": self.commit} if self.commit else {})}

    def fitted_to(self, encoder: Encoder) -> Parameters:
        """Return the parameters under the encoder's names.

        Raises:
            AdapterError: if it was trained on another encoder, or its factors are others.
        """
        model = encoder.settings.model
        same = (
            self.weights_sha256 == encoder.weights_sha256
            if self.weights_sha256
            else model == self.base_model or is_folder(model)
        )
        if not same:
            raise AdapterError(
                f"the adapter {self.name!r} was trained on {self.base_model!r}, not on {model!r}"
                + (" (the weights differ)" if self.weights_sha256 else "")
            )
        return {
            **{name: value for name, value in self.parameters.items() if not name.startswith(LORA)},
            **self._factors(encoder.factor_shapes),
        }

    def _factors(self, shapes: Mapping[str, tuple[int, ...]]) -> Parameters:
        left = lora_factors(self.parameters)
        factors: Parameters = {}
        for name, shape in shapes.items():
            # a model with a head has its encoder one level down: bert.encoder.layer.3. …
            found = [other for other in left if other == name or other.endswith(f".{name}")]
            if len(found) != 1 or tuple(left[found[0]].shape) != shape:
                given = {other: tuple(left[other].shape) for other in found} or f"none among {', '.join(left)}"
                raise AdapterError(
                    f"the adapter {self.name!r} does not fit the encoder: expected a factor {name} of shape {shape}, "
                    f"found {given}. textmeta adapts the upper layers of an encoder, the same linear layers in each"
                )
            factors[LORA + name] = left.pop(found[0])
        if left:
            raise AdapterError(f"the adapter {self.name!r} has factors that the encoder has not: {', '.join(left)}")
        return factors


def load_start(
    name: str | Path, *, revision: str | None = None, subfolder: str | None = None, access: HubAccess | None = None
) -> Start:
    """Load an adapter to start from, by its name (:func:`~textmeta.artifact.locate.locate`).

    Raises:
        AdapterError: if it is neither an adapter of textmeta nor a plain LoRA of PEFT, or damaged.
        HubError: if the Hub has no such repository, or cannot be reached.
    """
    where = locate(name, revision=revision, subfolder=subfolder, access=access)
    told = where.folder.resolve().name if where.kind == "folder" else str(name)
    if (where.folder / peft_files.CONFIG).exists() and not (where.folder / MANIFEST).exists():
        foreign = peft_files.read_foreign_lora(where.folder)
        logger.info("%s is a plain PEFT adapter of %s: %s", name, foreign.base_model, foreign.lora)
        parameters = {LORA + factor: value for factor, value in foreign.factors.items()}
        return Start(told, parameters, foreign.lora, foreign.base_model, commit=where.commit)
    adapter, where = load_from(name, revision=where.commit, subfolder=subfolder, access=access)
    return Start(
        told, adapter.parameters, adapter.lora, adapter.encoder.model, adapter.weights_sha256, commit=where.commit
    )
