"""What the files of an encoder may say: nothing that makes transformers unpickle, or read outside their folder.

`trust_remote_code=False` and `use_safetensors=True` leave some ways open, because a configuration can name other files.
"""

import json
from pathlib import Path
from typing import Any

from textmeta.errors import EncoderError

__all__ = ["check_encoder_files"]

MAX_BYTES = 2**26
INDEX = "model.safetensors.index.json"
# Keys that name a file to read, a package to import or code to download, with what is harmless there.
ATTENTION = (None, "eager", "sdpa")  # for others transformers may ask the Hub for code
REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "config.json": {
        "transformers_weights": (None,),
        "quantization_config": (None,),
        "attn_implementation": ATTENTION,
        "_attn_implementation": ATTENTION,
        "_attn_implementation_internal": ATTENTION,
    },
    "tokenizer_config.json": {"init_inputs": (None, []), "gguf_file": (None,)},
}
# Numbers for which something is built before the weights are looked at.
LIMITS = {"num_hidden_layers": 1000, "n_layers": 1000, "num_layers": 1000, "num_labels": 10**6}


def check_encoder_files(folder: Path) -> None:
    """Check an encoder's folder before transformers reads it.

    Raises:
        EncoderError: naming the file, and the key.
    """
    contents = {name: _read(folder / name) for name in REFUSED}
    for name, content in contents.items():
        for part in (content, *(value for value in content.values() if isinstance(value, dict))):
            for key, harmless in REFUSED[name].items():
                if part.get(key) not in harmless:
                    raise EncoderError(f"{folder / name}: {key!r} is {part[key]!r:.80}, which textmeta does not follow")
        if isinstance(content.get("vocab"), str):  # where others hold the words themselves
            raise EncoderError(f"{folder / name}: 'vocab' names a file: {content['vocab']!r:.80}")
        files = content.get("fast_tokenizer_files") or []
        if not isinstance(files, list) or any(Path(str(file)).name != file for file in files):
            raise EncoderError(
                f"{folder / name}: 'fast_tokenizer_files' is {files!r:.80}, expected files of the folder"
            )
    for key in _read(folder / "special_tokens_map.json"):
        if key.endswith(("_file", "_spm")):
            raise EncoderError(f"{folder / 'special_tokens_map.json'}: {key!r} names a file, which is not followed")
    config = contents["config.json"]
    for key, limit in LIMITS.items():
        if isinstance(config.get(key), int) and config[key] > limit:
            raise EncoderError(f"{folder / 'config.json'}: {key!r} is {config[key]!r:.40}, expected at most {limit}")
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
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise EncoderError(f"{path} is no plain file of at most {MAX_BYTES} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EncoderError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise EncoderError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
