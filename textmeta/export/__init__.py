"""ONNX: a task and its encoder as one graph that runs without PyTorch."""

from importlib import import_module
from types import ModuleType

from textmeta.errors import SettingsError


def onnx_part(name: str) -> ModuleType:
    """Return a file of this folder by its name; SettingsError if what it needs is not installed."""
    try:
        return import_module(f"textmeta.export.{name}")
    except ModuleNotFoundError as error:
        raise SettingsError(f"ONNX needs {error.name}: pip install 'textmeta[onnx]'") from error
