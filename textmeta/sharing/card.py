"""What is said of an adapter: its model card, and what `textmeta info` shows; templates, filled by its JSON files."""

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from textmeta.data.labels import label_from_json, plain
from textmeta.hub import is_repo_id

__all__ = ["PLACEHOLDER", "adapter_info", "is_edited", "model_card"]

logger = logging.getLogger(__name__)

SIGNATURE = "\n<!-- The lines above are as textmeta wrote them if their sha256 is "
PLACEHOLDER = '"path/to/this/folder"'  # stands in the card's code until it is pushed
# of a template: kept where there is what it tells of, or where there is none; or written for each of several
PART = r"<!-- (if|if not|each) (\w+) -->\n(.*?)<!-- end -->\n"
MOST_SHOWN = 50

Content = Mapping[str, Any]


def model_card(adapter: Content, classifier: Content | None = None) -> str:
    """Return the model card, Markdown with the Hub's metadata block, of the content of an adapter's JSON files."""
    text = _filled("card.md", adapter, classifier, name=PLACEHOLDER)
    return text + SIGNATURE + _digest(text)


def adapter_info(adapter: Content, classifier: Content | None = None, **more: str) -> str:
    """Return what ``textmeta info`` shows: lines of plain text, with the place and the size."""
    return _filled("info.txt", adapter, classifier, **more).replace("`", "")


def is_edited(card: str) -> bool:
    """Whether a card is somebody's own, or was changed since textmeta wrote it."""
    text, _, digest = card.rpartition(SIGNATURE)
    return digest != _digest(text)


def _digest(text: str) -> str:
    return f"{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()} -->\n"


def _filled(template: str, adapter: Content, classifier: Content | None, **more: str) -> str:
    facts, model = _facts(adapter, classifier) | more, adapter["encoder"]["model"]
    try:
        facts |= _training(model, adapter["record"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        # a record may be anybody's, and hold anything
        logger.warning("the training record is not what training writes (%r): it is left out", error)
        facts |= _training(model, {})

    def part(found: re.Match[str]) -> str:
        kind, name, text = found.groups()
        if kind == "each":
            return "".join(Template(text).substitute(row).replace("$", "$$") for row in facts[name])
        return text if bool(facts[name]) is (kind == "if") else ""

    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    text = Template(re.sub(PART, part, text, flags=re.DOTALL)).substitute(facts)
    return re.sub(r"\n{3,}", "\n\n", text)


def _facts(adapter: Content, classifier: Content | None) -> dict[str, Any]:
    """Return what an adapter and a classifier are, by the names that templates have for it."""
    encoder, learner, versions = adapter["encoder"], adapter["learner"], adapter["versions"]
    revision = adapter["encoder_commit"] or encoder["revision"]
    labels = [plain(label_from_json(label)) for label in (classifier or {}).get("classes", ())]
    support = classifier and classifier["support"]
    stored = len(support["examples"]) + len(support["unlabelled"]) if support else 0
    index = adapter["index"] or ()
    known: list[dict[str, Any]] = [{"name": plain(own["name"]), "classes": len(own["classes"])} for own in index]
    own = {name: plain(value) for name, value in {**encoder, **adapter["lora"], **learner}.items()}
    return own | {
        "long_texts": {"cut": "cut at", "window": "read in windows of"}[encoder.get("long_texts", "cut")],
        "base": f'"{own["model"]}"' + (f', revision="{plain(revision)}"' if revision else ""),
        "revision": f"`{plain(revision)}`" if revision else "unknown",
        "weights_sha256": adapter["encoder_sha256"],
        "layers": ", ".join(map(plain, learner["layers"])),
        "known": known,
        "index": sum(corpus["classes"] for corpus in known),
        "ways": len(labels),
        "classes": ", ".join(f"`{label}`" for label in labels[:MOST_SHOWN]) + ", …" * (len(labels) > MOST_SHOWN),
        "support": stored if support and support["kind"] == "texts" else 0,
        "states": stored if support and support["kind"] == "states" else 0,
        "no_support": labels and support is None,
        "textmeta": plain(versions.get("textmeta", "")),
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(versions.items())),
    }


def _training(model: str, record: Content) -> dict[str, Any]:
    """Return how an adapter was trained, on what, and with what results."""
    settings, sources = record.get("settings", {}), record.get("sources", ())
    algorithm = plain(settings.get("algorithm", ""))
    # of all sources, those on the Hub alone have a commit
    datasets = {source["dataset"] for source in sources if source.get("commit")}
    metadata = ModelCardData(
        library_name="textmeta",
        pipeline_tag="text-classification",
        base_model=model if is_repo_id(model) else None,
        base_model_relation="adapter" if is_repo_id(model) else None,
        datasets=sorted(name for name in datasets if is_repo_id(name)) or None,
        tags=["textmeta", "few-shot", "meta-learning", "lora", "peft", *([algorithm] if algorithm else [])],
        metrics=["accuracy"],
    )
    return {
        "metadata": metadata.to_yaml(),
        "algorithm": algorithm,
        "episodes": f"{settings.get('episodes', 0):d}",
        "corpora": list(map(_corpus, settings.get("corpora", ()), sources)),
        "results": [_result(name, row) for name, row in record.get("results", {}).items()],
    }


def _corpus(corpus: Content, source: Content) -> dict[str, str]:
    name, licence = plain(corpus["name"]), plain(source.get("license") or "not known")
    link = name
    if source.get("commit") and is_repo_id(source["dataset"]):
        link = f"[{name}](https://huggingface.co/datasets/{source['dataset']}) at `{plain(source['commit'])[:12]}`"
    return {"name": name, "link": link, "licence": licence, **{key: f"{corpus[key]:d}" for key in ("texts", "classes")}}


def _result(name: str, row: Content) -> dict[str, Any]:
    """Return what is said of a setting in which the adapter was compared with frozen prototypes."""
    ours = row["meta_trained"]
    before, after = (f"{100 * own['accuracy']:.2f} ± {100 * own['accuracy_ci95']:.2f}" for own in (row["frozen"], ours))
    difference, low, high = (f"{100 * row['paired'][key]:+.2f}" for key in ("difference", "low", "high"))
    told = {"name": plain(name), "episodes": ours["episodes"], "ece": f"{100 * ours['ece']:.1f}"}
    return {**told, "before": before, "after": after, "difference": f"{difference} [{low}, {high}]"}
