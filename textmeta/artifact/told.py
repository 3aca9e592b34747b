"""What a training record says, for cards and terminals; a record may be anybody's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from textmeta.data.corpus import CorpusSettings
from textmeta.data.texts import plain
from textmeta.hub import is_repo_id
from textmeta.tasks import KnownTasks

__all__ = [
    "algorithm_of",
    "conditioning_of",
    "corpora_of",
    "dataset_id",
    "is_hub",
    "known_of",
    "names_of",
]


def algorithm_of(record: Mapping[str, Any]) -> str | None:
    """Return the name of the algorithm that a record tells of."""
    name = record.get("settings", {}).get("training", {}).get("algorithm")
    return str(name) if name else None


def corpora_of(record: Mapping[str, Any], part: str = "train") -> list[dict[str, Any]]:
    """Return the corpora of a part of the training, each with its source where that is known."""
    corpora = record.get("settings", {}).get(part, {}).get("corpora", [])
    sources = record.get("sources") or [{} for _ in corpora]
    return [{**corpus, "source": source} for corpus, source in zip(corpora, sources, strict=False)]


def is_hub(corpus: Mapping[str, Any]) -> bool:
    """Whether a corpus came from the Hub, and not from a file."""
    dataset = corpus["source"].get("dataset", "")
    return is_repo_id(dataset) and not CorpusSettings(dataset).is_file


def names_of(corpora: Sequence[Mapping[str, Any]]) -> str:
    """Return the names of corpora, for a sentence."""
    return ", ".join(str(corpus["name"]) for corpus in corpora) or "unknown corpora"


def dataset_id(corpora: Sequence[Mapping[str, Any]]) -> str:
    """Return what the metadata calls the data set of a result: letters, digits, dashes."""
    ids = [corpus["source"]["dataset"] for corpus in corpora if corpus.get("source") and is_hub(corpus)]
    return ids[0] if len(ids) == 1 else re.sub(r"[^a-zA-Z0-9]+", "-", names_of(corpora)).strip("-") or "unknown"


def conditioning_of(conditioning: Mapping[str, Any]) -> str:
    """Say what task encoder there is and what it decides, from the settings of the conditioning."""
    encoder = conditioning["task_encoder"]
    starts = {
        "banks": f"LoRA starts from {conditioning['banks']} banks",
        "gates": "a gate for each layer scales where LoRA starts",
        "none": "LoRA starts the same for every task",
    }
    temperature = "each task has a temperature of its own" if conditioning["temperature"] else "one temperature for all"
    return f"{encoder['kind']}, embeddings of {encoder['size']} numbers; {starts[conditioning['start']]}; {temperature}"


def known_of(known: KnownTasks) -> str:
    """Say how many classes of which corpora an index of training tasks has."""
    corpora = [f"{plain(name)[:80]}: {len(classes)}" for name, classes in known.classes.items()]
    return ", ".join(corpora[:10]) + (f", and {len(corpora) - 10} corpora more" if len(corpora) > 10 else "")
