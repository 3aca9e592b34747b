"""What the files of an encoder may say: nothing that makes transformers unpickle, or read outside their folder.

`trust_remote_code=False` and `use_safetensors=True` leave some ways open, because a configuration can name other files.
"""

import json
from pathlib import Path
from typing import Any

from textmeta.errors import EncoderError

__all__ = ["check_encoder_files"]

INDEX = "model.safetensors.index.json"
# Keys that name a file to read or a package to import, with what is harmless there.
REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "config.json": {"transformers_weights": (None,), "quantization_config": (None,)},
    "tokenizer_config.json": {"init_inputs": (None, []), "gguf_file": (None,), "vocab": (None,)},
}


def check_encoder_files(folder: Path) -> None:
    """Check an encoder's folder before transformers reads it.

    Raises:
        EncoderError: naming the file, and the key.
    """
    for name, keys in REFUSED.items():
        content = _read(folder / name)
        for key, harmless in keys.items():
            value = content.get(key)
            if value not in harmless and not (key == "vocab" and not isinstance(value, str)):
                raise EncoderError(f"{folder / name}: {key!r} is {value!r:.80}, which textmeta does not follow")
        for file in content.get("fast_tokenizer_files") or []:
            if Path(str(file)).name != file:
                raise EncoderError(f"{folder / name}: 'fast_tokenizer_files' names {file!r:.80}, outside the folder")
    if (folder / INDEX).exists():
        weights = _read(folder / INDEX).get("weight_map")
        files = set(map(str, weights.values())) if isinstance(weights, dict) else {""}
        wrong = sorted(file for file in files if Path(file).name != file or not file.endswith(".safetensors"))
        if wrong:
            raise EncoderError(f"{folder / INDEX}: expected safetensors files of its folder, found {wrong[0]!r:.80}")


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object, an empty one where there is no such file."""
    if not path.exists():
        return {}
    if not path.is_file():
        raise EncoderError(f"{path} is no plain file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EncoderError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise EncoderError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
