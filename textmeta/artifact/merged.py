"""A stand-alone sentence encoder: the transformer with its LoRA merged, in the layout of sentence-transformers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from textmeta.errors import AdapterError
from textmeta.model.encoder import Encoder
from textmeta.model.pretrained import load_pretrained, weights_digest

__all__ = ["write_merged"]

MODULES = ("Transformer", "Pooling", "Normalize")


def write_merged(folder: Path, encoder: Encoder, factors: Mapping[str, Tensor]) -> None:
    """Write an encoder with W + (alpha / rank) · B A in place of W (Hu et al., 2021, section 4.1).

    Args:
        folder: where to; must not exist, or be empty.
        encoder: whose transformer, pooling and length.
        factors: every LoRA factor by name, (out, in).

    Raises:
        AdapterError: if the folder holds anything, cannot be written, or the encoder's files have changed since it was
            loaded.
    """
    folder = folder.resolve()
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
    new = folder.with_name(f".{folder.name}.textmeta-new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        pretrained.model.save_pretrained(new)
        pretrained.tokenizer.save_pretrained(new)
        for name, content in _layout(encoder).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise AdapterError(f"cannot write a merged encoder to {folder}: {error}") from error
        raise


def _layout(encoder: Encoder) -> dict[str, Any]:
    """Return the files that tell sentence-transformers how a sentence becomes a vector."""
    names = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{module}"}
        for number, (path, module) in enumerate(zip(names, MODULES, strict=True))
    ]
    pooling = {
        "word_embedding_dimension": encoder.hidden_size,
        "pooling_mode_cls_token": encoder.settings.pooling == "cls",
        "pooling_mode_mean_tokens": encoder.settings.pooling == "mean",
    }
    return {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": encoder.settings.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
