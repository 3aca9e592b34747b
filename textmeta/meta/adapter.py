"""An adapter: all that meta-training makes, with the identity of the encoder that it was made for."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, SettingsError
from textmeta.files import write_atomically
from textmeta.heads.scope import SCOPE_INPUTS
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings

__all__ = ["CoreAdapter"]

FORMAT = 8
NUMBERS, TENSORS, SCOPE_RULE = "core.json", "core.safetensors", "scope_rule"


@dataclass(frozen=True)
class CoreAdapter:
    """What meta-training makes.

    Args:
        encoder: which one, and how long texts may be.
        encoder_sha256: of its weights.
        lora: of the adapter.
        learner: how tasks are learned.
        initialisation: where they start.
        scope_rule: (8,) of :func:`~textmeta.heads.scope.scope_probability`; None where none was fitted.
        record: how it was made.
    """

    encoder: EncoderSettings
    encoder_sha256: str
    lora: LoraSettings
    learner: LearnerSettings
    initialisation: Initialisation
    scope_rule: Tensor | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the adapter's two files into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.initialisation.tensors().items()}
        if self.scope_rule is not None:
            tensors[SCOPE_RULE] = self.scope_rule.cpu().contiguous()
        write_atomically(folder / TENSORS, save(tensors))
        told = {
            "format": FORMAT,
            "encoder": asdict(self.encoder),
            "encoder_sha256": self.encoder_sha256,
            "lora": asdict(self.lora),
            "learner": asdict(self.learner),
            "record": dict(self.record),
        }
        write_atomically(folder / NUMBERS, (json.dumps(told, indent=1) + "\n").encode())

    @classmethod
    def load(
        cls, folder: Path, *, precision: str = "no", device: str = "cpu"
    ) -> tuple["CoreAdapter", TokenStateReader]:
        """Read an adapter and the encoder that it was trained on.

        Raises:
            AdapterError: if a file is missing or damaged, a tensor has another name or shape than it should, or the
                encoder is another one.
        """
        try:
            told = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                raise AdapterError(f"{folder} has format {told['format']}, expected {FORMAT}")
            sha256, record = told["encoder_sha256"], told["record"]
            tensors = load_file(folder / TENSORS, device=device)
            encoder_settings = EncoderSettings(**told["encoder"])
            lora = LoraSettings(**{**told["lora"], "targets": _tuple(told["lora"]["targets"])})
            settings = LearnerSettings(**{**told["learner"], "layers": tuple(told["learner"]["layers"])})
        except (OSError, SafetensorError, SettingsError, ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"cannot read the adapter {folder}: {error!r}") from error
        encoder = Encoder(encoder_settings, lora, device, precision)
        if encoder.weights_sha256 != sha256:
            raise AdapterError(f"{folder} was trained on another encoder than {encoder_settings.model} is")
        try:
            reader = TokenStateReader(encoder, settings.layers)
        except SettingsError as error:
            raise AdapterError(f"{folder}: {error}") from error
        for name, value in tensors.items():
            if value.dtype != torch.float32 or not torch.isfinite(value).all():
                raise AdapterError(f"{folder}: {name} is not float32, or not finite")
        rule = tensors.pop(SCOPE_RULE, None)
        if rule is not None and rule.shape != (len(SCOPE_INPUTS) + 1,):
            raise AdapterError(f"{folder}: the scope rule is {tuple(rule.shape)}, expected ({len(SCOPE_INPUTS) + 1},)")
        shape = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, settings, seed=0)
        return cls(encoder_settings, sha256, lora, settings, shape.with_tensors(tensors), rule, record), reader


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)
