"""Tensors as they are stored: float32, finite, in the safetensors format."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from textmeta.errors import AdapterError

__all__ = ["read_tensors", "write_tensors"]


def write_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a safetensors file."""
    stored = {
        # copies, because safetensors refuses tensors that share memory
        name: value.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    return save(stored, metadata={"format": "pt"})  # which PEFT and transformers ask for


def read_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; errors name its path.

    Raises:
        AdapterError: if it is damaged, or a tensor is not float32, or has values that are not finite.
    """
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error
    for name, value in tensors.items():
        if value.dtype != torch.float32:
            raise AdapterError(f"{path}: tensor {name!r:.300} is {value.dtype}, expected torch.float32")
        if not value.isfinite().all():
            raise AdapterError(f"{path}: tensor {name!r:.300} has values that are not finite")
    return tensors
