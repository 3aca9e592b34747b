"""The plain PEFT part of an adapter folder, and LoRA adapters that others made.

``adapter_config.json`` follows from everything else in the folder, so loading compares it with what it must be: it can
then hold nothing that PEFT would act on and textmeta does not know, such as a module to import.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from textmeta.artifact.folder import read_file
from textmeta.artifact.parsing import member, read_json, read_tensors, write_json
from textmeta.errors import AdapterError, DamagedAdapterError
from textmeta.model.lora import LoraSettings

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "ForeignLora",
    "check_config",
    "config_file",
    "factors_of",
    "read_foreign_lora",
    "tensor_names",
]

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Of a foreign adapter's configuration: what textmeta reads, and what has no bearing on the features.
READ = {"init_lora_weights", "r", "lora_alpha", "use_rslora", "peft_type", "base_model_name_or_path", "target_modules"}
WITHOUT_BEARING = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "exclude_modules", "lora_dropout"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
# Parts of a model with a head that are not its encoder.
HEADS = frozenset({"classifier", "pre_classifier", "score", "pooler", "qa_outputs", "lm_head", "cls"})
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the encoder's own weights


def config_file(base_model: str, revision: str | None, lora: LoraSettings, factors: Iterable[str]) -> bytes:
    """Return the content of ``adapter_config.json``.

    Args:
        base_model: id or folder of the encoder.
        revision: its commit on the Hub, if known.
        lora: settings of the LoRA.
        factors: names of its factors (``encoder.layer.3.attention.self.query.lora_A.weight``).
    """
    modules = {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in factors}
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
    }
    return write_json(config)


def check_config(content: bytes, expected: bytes, path: Path) -> None:
    """Check that ``adapter_config.json`` says what it must, and for the rest nothing but PEFT's defaults.

    Raises:
        AdapterError: naming the key.
    """
    found, must = read_json(content, path), read_json(expected, path)
    known = {**_defaults(), **must}
    for key in sorted(found.keys() | must.keys()):
        value = found.get(key)
        if isinstance(value, list):
            value = sorted(value, key=str)
        if key != "peft_version" and value != known.get(key):
            raise AdapterError(f"{path}: {key!r} is {found.get(key)!r:.80}, expected {known.get(key)!r:.80}")


def tensor_names(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return LoRA factors under PEFT's names."""
    return {PREFIX + name: value for name, value in factors.items()}


def factors_of(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return LoRA factors by the encoder's names.

    Raises:
        AdapterError: if a tensor is none.
    """
    for name in tensors:
        if not re.fullmatch(re.escape(PREFIX) + r".+\.lora_[AB]\.weight", name):
            raise AdapterError(f"{path}: unexpected tensor {name!r}, expected LoRA factors alone")
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


@dataclass(frozen=True)
class ForeignLora:
    """A LoRA adapter that PEFT wrote, as a start for meta-training.

    Args:
        factors: LoRA factors by the names that they have there; PEFT's scale is multiplied into B.
        lora: settings that give an encoder such factors.
        base_model: what it was trained on, as it says.
    """

    factors: dict[str, Tensor]
    lora: LoraSettings
    base_model: str


def read_foreign_lora(folder: Path) -> ForeignLora:
    """Read a plain PEFT LoRA adapter, whoever made it; nothing in it is imported or run.

    The tensors of a head that PEFT saved are left out, with a message.

    Raises:
        AdapterError: if it is no LoRA, has pickled weights alone, or uses what textmeta's LoRA has not (DoRA, biases,
            ranks that differ …).
    """
    path = folder / CONFIG
    config = read_json(read_file(folder, CONFIG), path)
    if member(config, "peft_type", str, path) != "LORA":
        raise AdapterError(f"{path}: peft_type is {config['peft_type']!r:.40}, expected 'LORA'")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        raise AdapterError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r:.40}, which changes the encoder itself: "
            "let PEFT convert the adapter to plain LoRA first"
        )
    defaults = _defaults()
    for key, value in sorted(config.items()):
        if key not in READ | WITHOUT_BEARING and value != defaults.get(key) and value not in (None, False, [], {}):
            raise AdapterError(
                f"{path}: {key!r} is {value!r:.60}, which textmeta's LoRA does not know; expected {defaults.get(key)!r}"
            )
    try:
        content = read_file(folder, WEIGHTS)
    except DamagedAdapterError as error:
        raise AdapterError(
            f"{folder} has no {WEIGHTS}; pickled weights (adapter_model.bin) are never loaded"
        ) from error
    return _as_start(config, read_tensors(content, folder / WEIGHTS, any_float=True), path)


def _as_start(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> ForeignLora:
    factors: dict[str, Tensor] = {}
    layers, modules, ranks = set(), set(), set()
    for name, value in tensors.items():
        match = re.search(r"\.(\d+)\.([a-zA-Z_][\w.]*)\.lora_([AB])\.weight$", name)
        if match is not None and value.ndim == 2:
            factors[name.removeprefix(PREFIX)] = value
            layers.add(match[1])
            modules.add(match[2])
            ranks.add(value.shape[0 if match[3] == "A" else 1])
        elif HEADS.isdisjoint(name.split(".")) or "lora_" in name:
            raise AdapterError(f"{path.parent / WEIGHTS}: {name!r} is no LoRA factor of a layer, nor of a head")
        else:
            logger.info("%s: %s is of a head, and is left out", path.parent / WEIGHTS, name)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    valid = isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and 0 < alpha < 1e6
    if rank is None or alpha is None or not valid or ranks != {rank}:
        raise AdapterError(
            f"{path}: expected LoRA factors that all have the rank r = {rank!r:.40}, and a number lora_alpha = "
            f"{alpha!r:.40}; the ranks of its {len(factors)} factors are {sorted(ranks)}"
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)  # rsLoRA: Kalajdzievski (2023)
    scaled = {name: value * (scale if ".lora_B." in name else 1.0) for name, value in sorted(factors.items())}
    if not all(value.isfinite().all() for value in scaled.values()):
        raise AdapterError(f"{path.parent / WEIGHTS}: times lora_alpha = {alpha}, the factors are not finite")
    lora = LoraSettings(layers=len(layers), rank=rank, alpha=rank, targets=tuple(sorted(modules)))
    return ForeignLora(scaled, lora, str(config.get("base_model_name_or_path")))


def _defaults() -> dict[str, Any]:
    """Return PEFT's configuration of a LoRA of which nothing is said."""
    config: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    return config
