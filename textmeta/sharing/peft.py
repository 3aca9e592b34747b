"""LoRA in the formats of others: PEFT's, which an adapter folder has too, and encoders with LoRA merged into them.

``adapter_config.json`` follows from everything else in an adapter folder, so loading compares it with what it must be:
it can hold nothing that PEFT would act on, such as a module to import.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from textmeta.encoder.encoder import Encoder
from textmeta.encoder.lora import LORA_B
from textmeta.encoder.pretrained import load_pretrained, weights_digest
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError
from textmeta.meta.adapter import Adapter
from textmeta.sharing.format import write_json
from textmeta.sharing.tensors import read_tensors

__all__ = ["PREFIX", "config_file", "read_factors", "write_merged"]

PREFIX = "base_model.model."


# The files of an adapter folder


def config_file(adapter: Adapter) -> bytes:
    """Return the content of ``adapter_config.json``."""
    factors = adapter.initialisation.lora
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": adapter.encoder.model,
        "revision": adapter.commit or adapter.encoder.revision,
        "inference_mode": True,
        "r": adapter.lora.rank,
        "lora_alpha": adapter.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({re.sub(r"\.lora_[AB]\.weight$", "", name) for name in factors}),
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
        if value.ndim != 2 or 0 in value.shape or value.shape[1 if LORA_B in name else 0] != rank:
            raise AdapterError(f"{path}: {name} has shape {tuple(value.shape)}, expected a factor of rank {rank}")
        factors[name.removeprefix(PREFIX)] = value
    return factors


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
            lora_b = factors[name.replace(".lora_A.", LORA_B)]
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
