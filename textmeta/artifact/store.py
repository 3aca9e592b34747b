"""The adapter folder: what meta-learning learned, as plain PEFT files plus textmeta's own; safetensors and JSON only.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's own format, so that
``PeftModel.from_pretrained`` loads the start. ``textmeta.safetensors`` holds step sizes and temperature,
``textmeta.json`` the encoder, the inner loop and the training record, ``SHA256SUMS`` the hashes of all of these.
A fitted classifier adds ``classifier.safetensors`` and ``classifier.json``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from textmeta.artifact.card import model_card
from textmeta.artifact.folder import read_folder, write_folder
from textmeta.errors import AdapterError, SettingsError
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import LORA, Parameters
from textmeta.model.lora import LoraSettings

__all__ = ["Adapter", "FittedHead", "load_adapter", "save_adapter"]

FORMAT_VERSION = 1
PEFT_PREFIX = "base_model.model."
CARD = "README.md"


@dataclass(frozen=True)
class FittedHead:
    """What ``fit`` made of one task.

    Args:
        factors: every LoRA factor by name, (out, in).
        weights: (C, d), the head.
        classes: labels in the order of the head's rows, as JSON holds them.
    """

    factors: dict[str, Tensor]
    weights: Tensor
    classes: list[Any]


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter folder.

    Args:
        parameters: the initialisation.
        inner: the inner loop that it was learned for.
        encoder: settings of the encoder that it belongs to.
        lora: settings of the LoRA.
        weights_sha256: hash of the encoder's weights (:func:`~textmeta.model.pretrained.weights_digest`).
        record: how it was trained.
        fitted: of a fitted classifier.
    """

    parameters: Parameters
    inner: InnerLoopSettings
    encoder: EncoderSettings
    lora: LoraSettings
    weights_sha256: str
    record: dict[str, Any] = field(default_factory=dict)
    fitted: FittedHead | None = None

    def load_encoder(self, device: str | torch.device = "cpu", model: str | None = None) -> Encoder:
        """Load the encoder that this adapter belongs to.

        Args:
            device: where it runs.
            model: where to load it from, if not from the id or folder that the adapter names.

        Raises:
            AdapterError: if its weights are not those that the adapter was trained on.
        """
        settings = replace(self.encoder, model=model, revision=None) if model else self.encoder
        encoder = Encoder(settings, self.lora, device)
        if encoder.weights_sha256 != self.weights_sha256:
            raise AdapterError(
                f"the adapter belongs to {self.encoder.model} with weights {self.weights_sha256[:12]}…, but the "
                f"weights of {settings.model} are {encoder.weights_sha256[:12]}…"
            )
        shapes = {LORA + name: shape for name, shape in encoder.factor_shapes.items()}
        given = {name: tuple(v.shape) for name, v in self.parameters.items() if name.startswith(LORA)}
        if shapes != given:
            wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
            raise AdapterError(
                f"adapter_model.safetensors: {wrong[0]} has shape {given.get(wrong[0])}, expected "
                f"{shapes.get(wrong[0])} ({len(wrong)} such tensors)"
            )
        if self.fitted is not None and self.fitted.weights.shape[1] != encoder.hidden_size:
            raise AdapterError(
                f"classifier.safetensors: weights have {self.fitted.weights.shape[1]} columns, but features of "
                f"{settings.model} have {encoder.hidden_size}"
            )
        return encoder


def save_adapter(
    folder: str | Path,
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    record: Mapping[str, Any],
    fitted: FittedHead | None = None,
) -> None:
    """Write an adapter folder, replacing what was there; a crash leaves the old one or the new one, whole.

    Args:
        folder: where to.
        encoder: that the adapter belongs to.
        parameters: the initialisation.
        inner: the inner loop that it was learned for.
        record: how it was trained; must be JSON-able.
        fitted: of a fitted classifier.

    Raises:
        AdapterError: if a value is not finite, or the folder cannot be replaced
            (:func:`~textmeta.artifact.folder.write_folder`).
    """
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in parameters.items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise AdapterError(f"not saved to {folder}: {name} has values that are not finite")
    encoder_settings = asdict(encoder.settings)
    del encoder_settings["cache_mb"]  # the machine's affair, not the adapter's
    meta = {
        "format_version": FORMAT_VERSION,
        "textmeta_version": version("textmeta"),
        "encoder": {**encoder_settings, "weights_sha256": encoder.weights_sha256},
        "lora": asdict(encoder.lora),
        "inner": asdict(inner),
        "record": dict(record),
    }
    lora = {PEFT_PREFIX + name.removeprefix(LORA): v for name, v in tensors.items() if name.startswith(LORA)}
    files = {
        "adapter_config.json": _json(_peft_config(encoder)),
        "adapter_model.safetensors": save_tensors(lora, metadata={"format": "pt"}),
        "textmeta.safetensors": save_tensors({n: v for n, v in tensors.items() if not n.startswith(LORA)}),
        "textmeta.json": _json(meta),
        CARD: model_card(meta).encode(),
    }
    if fitted is not None:
        factors = {LORA + name: value.detach().cpu().contiguous() for name, value in fitted.factors.items()}
        files["classifier.safetensors"] = save_tensors(
            {**factors, "weights": fitted.weights.detach().cpu().contiguous()}
        )
        files["classifier.json"] = _json({"classes": fitted.classes})
    write_folder(Path(folder), files, unlisted=frozenset({CARD}))


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder, checking hashes, format, names, shapes and finiteness.

    Raises:
        AdapterError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    files = read_folder(folder)
    meta = _read_json(files, folder, "textmeta.json")
    found = meta.get("format_version")
    if found != FORMAT_VERSION:
        raise AdapterError(
            f"{folder / 'textmeta.json'} has format version {found!r}, this textmeta reads {FORMAT_VERSION}"
            + ("; a newer textmeta is needed" if isinstance(found, int) and found > FORMAT_VERSION else "")
        )
    try:
        inner = _settings(InnerLoopSettings, meta["inner"])
        lora = _settings(LoraSettings, meta["lora"])
        encoder_fields = dict(meta["encoder"])
        weights_sha256 = str(encoder_fields.pop("weights_sha256"))
        encoder = _settings(EncoderSettings, encoder_fields)
        record = dict(meta["record"])
    except (AttributeError, KeyError, TypeError, ValueError, SettingsError) as error:
        raise AdapterError(f"{folder / 'textmeta.json'}: {type(error).__name__}: {error}") from error

    factors = {}
    for name, value in _read_tensors(files, folder, "adapter_model.safetensors").items():
        if not name.startswith(PEFT_PREFIX):
            raise AdapterError(f"{folder / 'adapter_model.safetensors'}: unexpected tensor {name!r}")
        factors[name.removeprefix(PEFT_PREFIX)] = value
    scalars = _read_tensors(files, folder, "textmeta.safetensors")
    expected = start_parameters({name: tuple(value.shape) for name, value in factors.items()}, inner)
    shapes = {name: tuple(value.shape) for name, value in expected.items() if not name.startswith(LORA)}
    given = {name: tuple(value.shape) for name, value in scalars.items()}
    if shapes != given:
        raise AdapterError(f"{folder / 'textmeta.safetensors'}: expected tensors {shapes}, found {given}")
    parameters = {**{LORA + name: value for name, value in sorted(factors.items())}, **scalars}

    fitted = None
    if "classifier.json" in files:
        tensors = _read_tensors(files, folder, "classifier.safetensors")
        weights = tensors.pop("weights", torch.empty(0))
        classes = _read_json(files, folder, "classifier.json").get("classes")
        if not isinstance(classes, list) or weights.ndim != 2 or len(weights) != len(classes):
            raise AdapterError(
                f"{folder / 'classifier.safetensors'}: weights have shape {tuple(weights.shape)}, but "
                f"classifier.json lists {len(classes) if isinstance(classes, list) else 'no'} classes"
            )
        adapted = {name.removeprefix(LORA): value for name, value in tensors.items()}
        if {n: v.shape for n, v in adapted.items()} != {n: v.shape for n, v in factors.items()}:
            raise AdapterError(f"{folder / 'classifier.safetensors'} does not hold the adapter's LoRA factors")
        fitted = FittedHead(adapted, weights, classes)
    return Adapter(parameters, inner, encoder, lora, weights_sha256, record, fitted)


def _peft_config(encoder: Encoder) -> dict[str, Any]:
    config = {
        **encoder.peft_config.to_dict(),  # type: ignore[no-untyped-call]
        "base_model_name_or_path": encoder.settings.model,
        "revision": encoder.settings.revision,
        "task_type": "FEATURE_EXTRACTION",
        "inference_mode": True,
    }
    # PEFT holds some lists as sets, whose order differs from process to process
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _read_json(files: Mapping[str, bytes], folder: Path, name: str) -> dict[str, Any]:
    if name not in files:
        raise AdapterError(f"{folder} is no textmeta adapter: it has no {name}")
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise AdapterError(f"{folder / name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{folder / name}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_tensors(files: Mapping[str, bytes], folder: Path, name: str) -> dict[str, Tensor]:
    if name not in files:
        raise AdapterError(f"{folder} is no whole textmeta adapter: it has no {name}")
    try:
        tensors = load_tensors(files[name])
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"{folder / name} cannot be read: {error}") from error
    for key, value in tensors.items():
        if value.dtype != torch.float32:
            raise AdapterError(f"{folder / name}: tensor {key!r} is {value.dtype}, expected torch.float32")
        if not value.isfinite().all():
            raise AdapterError(f"{folder / name}: tensor {key!r} has values that are not finite")
    return tensors


S = TypeVar("S")


def _settings(kind: Callable[..., S], fields: Mapping[str, Any]) -> S:
    """Make settings of a JSON object; JSON has no tuples."""
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
