"""What is said of an adapter: its model card, and what `textmeta info` shows; templates, filled by its JSON files."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from textmeta.data.labels import label_from_json, plain
from textmeta.errors import logger
from textmeta.hub import is_repo_id

SIGNATURE = "\n<!-- The lines above are as textmeta wrote them if their sha256 is "
PLACEHOLDER = '"path/to/this/folder"'  # stands in the card's code until it is pushed
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    finalize=plain,  # names, labels and the record may be anybody's
)

Content = Mapping[str, Any]


def model_card(adapter: Content, classifier: Content | None = None) -> str:
    """Return the model card, Markdown with the Hub's metadata block, of the content of an adapter's JSON files."""
    facts, model = _facts(adapter, classifier), adapter["encoder"]["model"]
    algorithm = plain(facts["algorithm"])
    metadata = ModelCardData(
        library_name="textmeta",
        pipeline_tag="text-classification",
        base_model=model if is_repo_id(model) else None,
        base_model_relation="adapter" if is_repo_id(model) else None,
        datasets=sorted(facts["datasets"]) or None,
        tags=["textmeta", "few-shot", "meta-learning", "lora", "peft", *([algorithm] if algorithm else [])],
        metrics=["accuracy"],
    )
    body = TEMPLATES.get_template("card.md").render(adapter, **facts, name=PLACEHOLDER)
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    return text + SIGNATURE + _digest(text)


def adapter_info(adapter: Content, classifier: Content | None = None, **more: str) -> str:
    """Return what ``textmeta info`` shows: lines of plain text, with the place and the size."""
    return TEMPLATES.get_template("info.txt").render(adapter, **_facts(adapter, classifier), **more)


def is_edited(card: str) -> bool:
    """Whether a card is somebody's own, or was changed since textmeta wrote it."""
    text, _, digest = card.rpartition(SIGNATURE)
    return digest != _digest(text)


def _digest(text: str) -> str:
    return f"{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()} -->\n"


def _facts(adapter: Content, classifier: Content | None) -> dict[str, Any]:
    """Return what templates say beside what stands in the files."""
    encoder, support = adapter["encoder"], classifier and classifier["support"]
    try:
        training = _training(adapter["record"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        # a record may be anybody's, and hold anything
        logger.warning("the training record is not what training writes (%r): it is left out", error)
        training = _training({})
    return training | {
        "long_texts": {"cut": "cut at", "window": "read in windows of"}[encoder.get("long_texts", "cut")],
        "revision": adapter["encoder_commit"] or encoder["revision"],
        "labels": list(map(label_from_json, classifier["classes"])) if classifier else [],
        "stored": support["kind"] if support else "",
        "texts": len(support["examples"]) + len(support["unlabelled"]) if support else 0,
    }


def _training(record: Content) -> dict[str, Any]:
    """Return how an adapter was trained, on what, and with what results."""
    settings, sources = record.get("settings", {}), record.get("sources", ())
    # of all sources, those on the Hub alone have a commit
    known = {source["dataset"] for source in sources if source.get("commit")}
    corpora = [
        {**{key: own[key] for key in ("name", "texts", "classes")}, "licence": source.get("license") or "not known"}
        | {"commit": str(source.get("commit") or "")[:12], "dataset": source.get("dataset")}
        for own, source in zip(settings.get("corpora", ()), sources, strict=True)
    ]
    return {
        "algorithm": settings.get("algorithm", ""),
        "episodes": f"{settings.get('episodes', 0):d}",
        "datasets": set(filter(is_repo_id, known)),
        "corpora": corpora,
        "results": {name: _result(row) for name, row in record.get("results", {}).items()},
    }


def _result(row: Content) -> dict[str, Any]:
    """Return what is said of a setting in which the adapter was compared with frozen prototypes."""
    ours = row["meta_trained"]
    before, after = (f"{100 * own['accuracy']:.2f} ± {100 * own['accuracy_ci95']:.2f}" for own in (row["frozen"], ours))
    difference, low, high = (f"{100 * row['paired'][key]:+.2f}" for key in ("difference", "low", "high"))
    told = {"episodes": ours["episodes"], "ece": f"{100 * ours['ece']:.1f}"}
    return {**told, "before": before, "after": after, "difference": f"{difference} [{low}, {high}]"}
