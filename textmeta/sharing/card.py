"""The model card: the template ``card.md``, filled with what an adapter is and how it was trained."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from textmeta.data.labels import plain
from textmeta.hub import is_repo_id
from textmeta.meta.adapter import Adapter
from textmeta.sharing.support import FitInputs

__all__ = ["PLACEHOLDER", "is_edited", "model_card"]

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("card.md")
SIGNATURE = "\n<!-- The lines above are as textmeta wrote them if their sha256 is "
PLACEHOLDER = '"path/to/this/folder"'  # stands in the card's code until it is pushed
PART = r"<!-- if (not )?(\w+) -->\n(.*?)<!-- end -->\n"  # of the template, kept where there is what it tells of
MOST_SHOWN = 50


def model_card(adapter: Adapter, classes: Sequence[Any] | None = None, inputs: FitInputs | None = None) -> str:
    """Return the model card, Markdown with the Hub's metadata block.

    Args:
        adapter: that the folder holds.
        classes: of a fitted classifier, its labels.
        inputs: of a fitted classifier, what the folder holds of that which it was fitted on.
    """
    try:
        text = _filled(adapter, adapter.record, classes, inputs)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        # a record may be anybody's, and hold anything
        logger.warning("the training record is not what training writes (%r): the card leaves it out", error)
        text = _filled(adapter, {}, classes, inputs)
    return text + SIGNATURE + _digest(text)


def is_edited(card: str) -> bool:
    """Whether a card is somebody's own, or was changed since textmeta wrote it."""
    text, _, digest = card.rpartition(SIGNATURE)
    return digest != _digest(text)


def _digest(text: str) -> str:
    return f"{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()} -->\n"


def _filled(
    adapter: Adapter, record: Mapping[str, Any], classes: Sequence[Any] | None, inputs: FitInputs | None
) -> str:
    encoder, learner, index, settings = adapter.encoder, adapter.learner, adapter.index, record.get("settings", {})
    stored, states = (len(inputs.texts), bool(inputs.states)) if inputs else (0, False)
    labels, revision = list(classes or ()), adapter.commit or encoder.revision
    more = ", …" if len(labels) > MOST_SHOWN else ""
    values = {
        **asdict(encoder) | asdict(adapter.lora) | asdict(learner),
        "long_texts": {"cut": "cut at", "window": "read in windows of"}[encoder.long_texts],
        "metadata": _metadata(adapter, record).to_yaml(),
        "name": PLACEHOLDER,
        "base": f'"{encoder.model}"' + (f', revision="{revision}"' if revision else ""),
        "revision": f"`{revision}`" if revision else "unknown",
        "weights_sha256": adapter.weights_sha256,
        "layers": ", ".join(map(str, learner.layers or ())),
        "index": sum(map(len, index.classes.values())) if index else 0,
        "ways": len(labels),
        "classes": ", ".join(f"`{plain(label)}`" for label in labels[:MOST_SHOWN]) + more,
        "support": 0 if states else stored,
        "states": stored if states else 0,
        "no_support": labels and inputs is None,
        "algorithm": plain(settings.get("algorithm", "")),
        "episodes": f"{settings.get('episodes', 0):d}",
        "corpora": "\n".join(map(_corpus, settings.get("corpora", ()), record.get("sources", ()))),
        "results": "\n".join(_result(name, row) for name, row in record.get("results", {}).items()),
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(adapter.versions.items())),
    }

    def kept(part: re.Match[str]) -> str:
        return part[3] if bool(values[part[2]]) != bool(part[1]) else ""

    template = re.sub(PART, kept, TEMPLATE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\n{3,}", "\n\n", Template(template).substitute(values))


def _metadata(adapter: Adapter, record: Mapping[str, Any]) -> ModelCardData:
    base = adapter.encoder.model
    algorithm = record.get("settings", {}).get("algorithm")
    # of all sources, those on the Hub alone have a commit
    datasets = {source["dataset"] for source in record.get("sources", ()) if source.get("commit")}
    return ModelCardData(
        library_name="textmeta",
        pipeline_tag="text-classification",
        base_model=base if is_repo_id(base) else None,
        base_model_relation="adapter" if is_repo_id(base) else None,
        datasets=sorted(name for name in datasets if is_repo_id(name)) or None,
        tags=["textmeta", "few-shot", "meta-learning", "lora", "peft", *([plain(algorithm)] if algorithm else [])],
        metrics=["accuracy"],
    )


def _corpus(corpus: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """Return the row of a training corpus."""
    name, licence = plain(corpus["name"]), plain(source.get("license") or "not known")
    if source.get("commit") and is_repo_id(source["dataset"]):
        name = f"[{name}](https://huggingface.co/datasets/{source['dataset']}) at `{plain(source['commit'])[:12]}`"
    return f"| {name} | {corpus['texts']:d} | {corpus['classes']:d} | {licence} |"


def _result(name: str, row: Mapping[str, Any]) -> str:
    """Return the row of a setting in which the adapter was compared with frozen prototypes."""
    ours, paired = row["meta_trained"], row["paired"]
    parts = (row["frozen"], ours)
    before, after = (f"{100 * part['accuracy']:.2f} ± {100 * part['accuracy_ci95']:.2f}" for part in parts)
    difference, low, high = (f"{100 * paired[key]:+.2f}" for key in ("difference", "low", "high"))
    cells = (plain(name), ours["episodes"], before, after, f"{difference} [{low}, {high}]", f"{100 * ours['ece']:.1f}")
    return f"| {' | '.join(map(str, cells))} |"
