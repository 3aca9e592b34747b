"""The model card, written from the training record: the Hub's metadata block, and what a user needs to know."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from textmeta.artifact.told import (
    algorithm_of,
    conditioning_of,
    corpora_of,
    dataset_id,
    is_hub,
    known_of,
    names_of,
)
from textmeta.data.texts import plain
from textmeta.hub import is_repo_id
from textmeta.tasks import KnownTasks

__all__ = ["CARD", "PLACEHOLDER", "is_edited", "model_card", "understood", "usage_name"]

SIGNATURE = "\n<!-- The lines above are as textmeta wrote them if their sha256 is {} -->\n"

logger = logging.getLogger(__name__)

CARD = "README.md"
PLACEHOLDER = '"path/to/this/folder"'  # stands in the card's code until it is pushed, and again once it is pulled


def model_card(
    meta: Mapping[str, Any],
    classes: Sequence[Any] | None = None,
    support: int | None = None,
    known: KnownTasks | None = None,
) -> str:
    """Return the model card (Markdown with the Hub's metadata block) of an adapter.

    Args:
        meta: the content of its ``textmeta.json``.
        classes: of a fitted classifier, its labels.
        support: of a fitted classifier that holds its support texts, how many.
        known: the index of training tasks that the folder holds.
    """
    meta = {**meta, "record": understood(meta["record"])}
    parts = [
        f"---\n{_metadata(meta).to_yaml()}\n---",
        _introduction(meta, classes, support, known),
        _usage(meta, classes),
        _training(meta["record"]),
        _results(meta["record"]),
        _limits(meta),
        _remake(meta),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return text + SIGNATURE.format(_digest(text))


def is_edited(card: str) -> bool:
    """Whether a card is somebody's own, or was changed since textmeta wrote it."""
    text, mark, _ = card.rpartition(SIGNATURE[: SIGNATURE.index("{")])
    return not mark or card != text + SIGNATURE.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def usage_name(repo_id: str, subfolder: str | None) -> str:
    """Return the arguments by which the code of a card loads an adapter that is on the Hub."""
    return f'"{repo_id}"' + (f', subfolder="{subfolder}"' if subfolder else "")


def understood(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a training record, or an empty one if it is not what training writes: it may be anybody's."""
    encoder = dict.fromkeys(("model", "commit", "revision", "pooling", "max_length"), "")
    meta = {"record": record, "encoder": encoder, "versions": {}}
    try:
        _metadata(meta).to_yaml()
        _ = _training(record), _results(record), _remake(meta)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        logger.warning("the training record is not what training writes (%r): it is left out of what is shown", error)
        return {}
    return record


def _metadata(meta: Mapping[str, Any]) -> ModelCardData:
    base, record = meta["encoder"]["model"], meta["record"]
    algorithm = algorithm_of(record)
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=dataset_id(corpora),
            dataset_name=f"{names_of(corpora)}, classes never seen in training",
            dataset_config=name,  # results that agree in this would share one entry
            metric_type="accuracy",
            metric_value=round(float(row["meta_trained"]["accuracy"]), 4),
            metric_name=f"accuracy, mean of {row['meta_trained']['episodes']} episodes",
        )
        for name, row in record.get("results", {}).items()
        for corpora in [record.get("test", {}).get("corpora", corpora_of(record))]
    ]
    return ModelCardData(
        library_name="textmeta",
        pipeline_tag="text-classification",
        base_model=base if is_repo_id(base) else None,
        base_model_relation="adapter" if is_repo_id(base) else None,
        datasets=sorted({c["source"]["dataset"] for c in corpora_of(record) if is_hub(c)}) or None,
        tags=["textmeta", "few-shot", "meta-learning", "lora", "peft", *([algorithm] if algorithm else [])],
        metrics=["accuracy"],
        model_name="textmeta adapter" if results else None,
        eval_results=results or None,
    )


def _revision(encoder: Mapping[str, Any]) -> str | None:
    """Return the encoder's commit, or, if that is not known, the revision that was asked for."""
    revision: str | None = encoder["commit"] or encoder["revision"]
    return revision


def _introduction(
    meta: Mapping[str, Any], classes: Sequence[Any] | None, support: int | None, known: KnownTasks | None
) -> str:
    encoder = meta["encoder"]
    revision = _revision(encoder)
    what = (
        "# Fitted few-shot text classifier\n\nA meta-trained LoRA initialisation, adapted to one task."
        if classes is not None
        else "# Meta-trained LoRA initialisation for few-shot text classification\n\nFrom here, a few gradient steps "
        "on a handful of labelled texts make a classifier of classes that no model was trained on."
    )
    lines = [
        what,
        "",
        f"* Encoder: `{encoder['model']}`, {f'revision `{revision}`' if revision else 'revision unknown'}, sha256 of "
        f"its weights `{encoder['weights_sha256']}`; {encoder['pooling']} pooling, texts cut at "
        f"{encoder['max_length']} tokens.",
        f"* LoRA: rank {meta['lora']['rank']}, alpha {meta['lora']['alpha']}; {meta['inner']['steps']} inner steps on "
        f"{' and '.join(meta['inner']['adapt'])} by the loss of the {meta['inner']['loss']}, "
        f"{meta['inner']['head']} head.",
    ]
    if conditioning := meta["inner"].get("conditioning"):
        lines += [f"* Task encoder: {conditioning_of(conditioning)}."]
    if known is not None:
        lines += [
            f"* **The class names of the training corpora ({known_of(known)}) are stored in `tasks.json`**, with an "
            "embedding of each class and no texts. Whoever has this folder can read them."
        ]
    if classes is not None:
        shown = ", ".join(f"`{plain(label)}`" for label in classes[:50]) + (", …" if len(classes) > 50 else "")
        lines += [
            f"* Classes ({len(classes)}): {shown}.",
            f"* **The {support} texts that it was fitted on, with their labels, are stored in `classifier.json`.** "
            "Whoever has this folder can read them."
            if support is not None
            else "* The texts that it was fitted on are not stored.",
        ]
    return "\n".join(lines)


def _usage(meta: Mapping[str, Any], classes: Sequence[Any] | None) -> str:
    fit = (
        'clf.fit(["I lost my card", "my card was stolen", "what is my balance?"], ["card", "card", "balance"])\n'
        if classes is None
        else ""
    )
    revision = _revision(meta["encoder"])
    base = f'"{meta["encoder"]["model"]}"' + (f', revision="{revision}"' if revision else "")
    what = "start, not the fitted task (for that: `clf.merge`)" if classes is not None else "start"
    return (
        "## How to use it\n\n```python\nfrom textmeta import FewShotClassifier\n\n"
        f'clf = FewShotClassifier.from_pretrained({PLACEHOLDER})\n{fit}clf.predict(["someone took my wallet"])\n```\n\n'
        f"Or, without textmeta, the encoder with the meta-learned {what}:\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModel\n\n"
        f"model = PeftModel.from_pretrained(AutoModel.from_pretrained({base}), {PLACEHOLDER})\n```"
    )


def _training(record: Mapping[str, Any]) -> str:
    settings = record.get("settings", {})
    if not {"train", "training"} <= settings.keys():
        return "## Training\n\nNot meta-trained, or nothing is recorded of it."
    episodes, training = settings["train"]["episodes"], settings["training"]
    # of the training classes themselves it says nothing of new ones
    parts = {"training": corpora_of(record), "validation": corpora_of(record, "valid")}
    seen = bool(parts["training"]) and parts["training"] == parts["validation"]
    if seen:
        del parts["validation"]
    measured = "accuracy on the training classes" if seen else "validation accuracy"
    lines = [
        "## Training",
        "",
        f"Algorithm: {training['algorithm']}, {record['episodes']} episodes in {record['steps']} outer steps, of which "
        f"step {record['best_step']} is kept ({measured} {100 * record['valid_accuracy']:.2f} %).",
        f"Episodes: {_range(episodes['ways'])} ways, {_range(episodes['shots'])} shots, {_range(episodes['queries'])} "
        "queries a class.",
        "",
        "| corpus | part | texts | classes | licence |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {_title(corpus)} | {part} | {corpus['texts']} | {corpus['classes']} | {_licence(corpus)} |"
        for part, corpora in parts.items()
        for corpus in corpora
    ]
    if start := record.get("start"):
        at = f" at revision `{start['start_revision']}`" if start.get("start_revision") else ""
        lines += ["", f"Meta-training started from the adapter `{start['start']}`{at}."]
    return "\n".join(lines)


def _results(record: Mapping[str, Any]) -> str:
    results = record.get("results")
    if not results:
        return ""
    corpora = record.get("test", {}).get("corpora", [])
    lines = [
        "## Results",
        "",
        "Accuracy in per cent on classes never seen in training"
        + (f" ({names_of(corpora)}, {sum(c['classes'] for c in corpora)} classes)" if corpora else "")
        + ", mean over episodes with its 95 % interval; the difference is paired by episode.",
        "",
        "| | episodes | frozen prototypes | this adapter | difference | ECE |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        frozen, ours, paired = row["frozen"], row["meta_trained"], row["paired"]
        difference, low, high = (f"{100 * paired[key]:+.2f}" for key in ("difference", "low", "high"))
        lines.append(
            f"| {name} | {ours['episodes']} | {_percent(frozen)} | {_percent(ours)} | {difference} [{low}, {high}] | "
            f"{100 * ours['ece']:.1f} |"
        )
    return "\n".join(lines)


def _limits(meta: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "## Limits",
            "",
            f"* Only the first {meta['encoder']['max_length']} tokens of a text count, and only languages that the "
            "encoder knows.",
            "* Every text gets one of the classes, also one that belongs to none of them, unless `predict` is told to "
            "`reject` such texts, which an adapter can that was calibrated for it.",
            "* With a handful of examples a class, one wrong label weighs much; probabilities are less reliable far "
            "from the corpora above.",
            "* What the encoder and the corpora hold of prejudice, this adapter holds too: look at errors by group "
            "before decisions about people rest on it.",
        ]
    )


def _remake(meta: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in sorted(meta["versions"].items()) if number)
    text = f"## Versions\n\nWritten with {versions}."
    settings, sources = meta["record"].get("settings", {}), meta["record"].get("sources")
    if not {"train", "training"} <= settings.keys() or not sources or not all(s.get("dataset") for s in sources):
        return text  # of a corpus in hand nobody can say where another would get it
    encoder = {key: meta["encoder"][key] for key in ("model", "pooling", "max_length")}
    if revision := _revision(meta["encoder"]):
        encoder["revision"] = revision
    config = {
        "corpora": [_as_settings(source) for source in sources],
        "encoder": encoder,
        "lora": settings["lora"],
        "episodes": settings["train"]["episodes"],
        "inner": settings["inner"],
        "training": settings["training"],
        "precision": settings["encoder"]["precision"],
        **(meta["record"].get("start") or {}),
        **{key: meta["record"][key] for key in ("index_rows",) if key in meta["record"]},
    }
    written = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110)
    return (
        f"{text}\n\n## How to remake it\n\nWith `remake.yaml` as below (files named there have to be at hand), "
        f"`python recipes/meta_train.py --config remake.yaml --output runs/again`:\n\n```yaml\n{written}```"
    )


def _as_settings(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source as settings of a corpus: a Hub dataset at the commit that it had."""
    settings = {key: value for key, value in source.items() if key != "commit"}
    return {**settings, "revision": source["commit"]} if source.get("commit") else settings


def _title(corpus: Mapping[str, Any]) -> str:
    name, source = plain(corpus["name"]), corpus["source"]
    if not is_hub(corpus):
        return name
    at = f" at `{source['commit'][:12]}`" if source.get("commit") else ""
    return f"[{name}](https://huggingface.co/datasets/{source['dataset']}){at}"


def _licence(corpus: Mapping[str, Any]) -> str:
    return plain(corpus["source"].get("license") or "not known")


def _range(value: Any) -> str:
    return f"{value[0]} to {value[-1]}" if isinstance(value, list | tuple) else str(value)


def _percent(row: Mapping[str, float]) -> str:
    return f"{100 * row['accuracy']:.2f} ± {100 * row['accuracy_ci95']:.2f}"
