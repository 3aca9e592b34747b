"""LoRA in the formats of others: PEFT's, which an adapter folder has too, and encoders with LoRA merged into them.

``adapter_config.json`` follows from everything else in an adapter folder, so loading compares it with what it must be:
it can hold nothing that PEFT would act on, such as a module to import.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor, nn

from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.encoder.pretrained import load_pretrained, weights_digest
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, DamagedAdapterError
from textmeta.files import is_folder
from textmeta.hub import HubAccess
from textmeta.meta.initialisation import LORA
from textmeta.sharing.folder import read_file
from textmeta.sharing.format import CONFIG, WEIGHTS, read_json, write_json
from textmeta.sharing.tensors import read_tensors

__all__ = ["PREFIX", "config_file", "load_foreign_lora", "read_factors", "write_merged"]

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."
# Of a foreign adapter's configuration: what textmeta reads, and what has no bearing on what its layers make of a text.
READ = {"init_lora_weights", "r", "lora_alpha", "use_rslora", "peft_type", "base_model_name_or_path", "target_modules"}
WITHOUT_BEARING = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "exclude_modules", "lora_dropout"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
# Parts of a model with a head that are not its encoder.
HEADS = frozenset({"classifier", "pre_classifier", "score", "pooler", "qa_outputs", "lm_head", "cls"})
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the encoder's own weights
MAX_ALPHA = 10**6
MAX_NAME = 300  # the end of a name that is looked at: the expression takes time for long ones


# The files of an adapter folder


def config_file(base_model: str, revision: str | None, lora: LoraSettings, factors: Iterable[str]) -> bytes:
    """Return the content of ``adapter_config.json`` for LoRA factors of these names on an encoder."""
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


def read_factors(content: bytes, rank: int, path: Path) -> dict[str, Tensor]:
    """Return the LoRA factors that ``adapter_model.safetensors`` holds by the encoder's names; errors name its path.

    Raises:
        AdapterError: if a tensor is none, or of another rank.
    """
    factors = {}
    for name, value in sorted(read_tensors(content, path).items()):
        if not re.fullmatch(re.escape(PREFIX) + r".+\.lora_[AB]\.weight", name):
            raise AdapterError(f"{path}: unexpected tensor {name!r:.300}, expected LoRA factors alone")
        if value.ndim != 2 or 0 in value.shape or value.shape[1 if ".lora_B." in name else 0] != rank:
            raise AdapterError(f"{path}: {name} has shape {tuple(value.shape)}, expected a factor of rank {rank}")
        factors[name.removeprefix(PREFIX)] = value
    return factors


# LoRA adapters that others made


def load_foreign_lora(
    folder: Path, encoder: EncoderSettings, access: HubAccess | None = None
) -> tuple[LoraSettings, dict[str, Tensor]]:
    """Load a plain LoRA that PEFT wrote, whoever made it, for an encoder. Nothing in it is imported or run.

    PEFT's scale is multiplied into B. The tensors of a head that PEFT saved are left out, with a message.

    Returns:
        Settings that give an encoder such factors; the factors by the names of an initialisation's tensors.

    Raises:
        AdapterError: if it is no LoRA, has pickled weights alone, uses what textmeta's LoRA does not have (DoRA,
            biases, ranks that differ …), or does not belong to the encoder.
    """
    path = folder / CONFIG
    config = read_json(read_file(folder, CONFIG), path)
    _check_foreign(config, encoder, path)
    try:
        content = read_file(folder, WEIGHTS)
    except DamagedAdapterError as error:
        raise AdapterError(
            f"{folder} has no {WEIGHTS}; pickled weights (adapter_model.bin) are never loaded"
        ) from error
    path = folder / WEIGHTS
    factors: dict[str, Tensor] = {}
    layers, modules, ranks = set(), set(), set()
    for name, value in sorted(read_tensors(content, path, any_float=True).items()):
        match = re.search(r"\.(\d+)\.([a-zA-Z_][\w.]*)\.lora_([AB])\.weight$", name[-MAX_NAME:])
        if match is not None and value.ndim == 2:
            factors[name.removeprefix(PREFIX)] = value
            layers.add(match[1])
            modules.add(match[2])
            ranks.add(value.shape[0 if match[3] == "A" else 1])
        elif HEADS.isdisjoint(name.split(".")) or "lora_" in name:
            raise AdapterError(f"{path}: {name!r:.300} is no LoRA factor of a layer, nor of a head")
        else:
            logger.info("%s: %s is of a head, and is left out", path, name)
    rank, alpha = config["r"], config["lora_alpha"]
    if ranks != {rank}:
        raise AdapterError(f"{path}: expected LoRA factors of the rank r = {rank}, found the ranks {sorted(ranks)}")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)  # rsLoRA: Kalajdzievski (2023)
    factors = {name: value * (scale if ".lora_B." in name else 1.0) for name, value in factors.items()}
    if not all(value.isfinite().all() for value in factors.values()):
        raise AdapterError(f"{path}: times lora_alpha = {alpha}, the factors are not finite")
    lora = LoraSettings(layers=len(layers), rank=rank, alpha=rank, targets=tuple(sorted(modules)))
    return lora, _by_our_names(factors, Encoder(encoder, lora, access=access).factor_shapes)


def _check_foreign(config: Mapping[str, Any], encoder: EncoderSettings, path: Path) -> None:
    base = config.get("base_model_name_or_path")
    if encoder.model != base and not is_folder(encoder.model):
        raise AdapterError(f"{path}: the adapter was trained on {base!r:.200}, not on {encoder.model!r}")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r:.40}, expected 'LORA'")
    start, rank, alpha = config.get("init_lora_weights"), config.get("r"), config.get("lora_alpha")
    if start not in PLAIN_STARTS:
        raise AdapterError(
            f"{path}: init_lora_weights is {start!r:.40}, which changes the encoder itself: let PEFT convert the "
            "adapter to plain LoRA first"
        )
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < MAX_ALPHA:
        raise AdapterError(f"{path}: expected numbers, given r = {rank!r:.40} and lora_alpha = {alpha!r:.40}")
    defaults: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    for key, value in sorted(config.items()):
        if key not in READ | WITHOUT_BEARING and value != defaults.get(key) and value not in (None, False, [], {}):
            raise AdapterError(f"{path}: {key!r:.60} is {value!r:.60}, which textmeta's LoRA does not know")


def _by_our_names(factors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    left, found = dict(factors), {}
    for name, shape in shapes.items():
        # a model with a head has its encoder one level down: bert.encoder.layer.3. …
        same = [other for other in left if other == name or other.endswith(f".{name}")]
        if len(same) != 1 or tuple(left[same[0]].shape) != shape:
            given = {other: tuple(left[other].shape) for other in same} or f"none among {', '.join(left)}"
            raise AdapterError(
                f"the adapter does not fit the encoder: expected a factor {name} of shape {shape}, found {given}. "
                "textmeta adapts the upper layers of an encoder, the same linear layers in each"
            )
        found[LORA + name] = left.pop(same[0])
    if left:
        raise AdapterError(f"the adapter has factors that the encoder does not have: {', '.join(left)}")
    return found


# An encoder of its own


def write_merged(folder: Path, reader: TokenStateReader, factors: Mapping[str, Tensor]) -> None:
    """Write the encoder with LoRA merged into it, W + (alpha / rank) · B A in place of W, as a sentence encoder.

    ``SentenceTransformer(folder)`` makes of a text the mean over the tokens of its last layer, of length 1.

    Source: Hu et al. (2021), "LoRA", section 4.1.

    Args:
        folder: where to; must not exist, or be empty.
        reader: whose encoder.
        factors: every LoRA factor by name, (out, in).

    Raises:
        AdapterError: if the folder holds anything or cannot be written, or the encoder's files have changed by now.
    """
    folder, encoder = folder.resolve(), reader.encoder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(f"cannot write a merged encoder to {folder}: it is there already, and is not empty")
    pretrained = load_pretrained(*encoder.source, encoder.access)
    if weights_digest(pretrained.model) != encoder.weights_sha256:
        raise AdapterError(f"the weights of {encoder.source[0]} are no longer those that were loaded before")
    scale = encoder.lora.alpha / encoder.lora.rank
    for name, lora_a in factors.items():
        if ".lora_A." in name:
            linear = pretrained.model.get_submodule(name.removesuffix(".lora_A.weight"))
            assert isinstance(linear, nn.Linear), "LoRA is put on linear layers alone"
            lora_b = factors[name.replace(".lora_A.", ".lora_B.")]
            linear.weight.data += scale * (lora_b.detach().cpu() @ lora_a.detach().cpu())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".textmeta-") as beside:
            new = Path(beside) / folder.name
            pretrained.model.save_pretrained(new)
            pretrained.tokenizer.save_pretrained(new)
            for name, content in _sentence_transformers_files(encoder).items():
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            new.rename(folder)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"cannot write a merged encoder to {folder}: {error}") from error


def _sentence_transformers_files(encoder: Encoder) -> dict[str, Any]:
    """Return the files that tell sentence-transformers how a text becomes a vector."""
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    return {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{module}"}
            for number, (path, module) in enumerate(modules.items())
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": encoder.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": encoder.settings.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
