"""What an adapter is, in a few lines for a terminal."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from textmeta.artifact.adapter import Adapter
from textmeta.artifact.card import understood
from textmeta.artifact.locate import Location
from textmeta.artifact.told import algorithm_of, conditioning_of, corpora_of, known_of
from textmeta.data.texts import plain
from textmeta.model.initialisation import head_scalars, lora_factors

__all__ = ["describe"]


def describe(adapter: Adapter, where: Location) -> str:
    """Say what a loaded, and therefore whole, adapter is and what it was trained on.

    Args:
        adapter: as it was loaded.
        where: it was found.
    """
    encoder, inner, record = adapter.encoder, adapter.inner, understood(adapter.record)
    numbers = sum(value.numel() for value in lora_factors(adapter.parameters).values())
    rows = [
        ("what", "meta-trained adapter" if adapter.fitted is None else "fitted classifier"),
        ("where", f"{where.folder} ({where.kind}{f', commit {where.commit}' if where.commit else ''})"),
        ("whole", "yes: every hash, name, shape and number is as it must be"),
        ("encoder", f"{encoder.model} (revision {adapter.commit or encoder.revision or 'unknown'})"),
        ("", f"sha256 of its weights {adapter.weights_sha256}"),
        ("", f"{encoder.pooling} pooling, texts cut at {encoder.max_length} tokens"),
        ("LoRA", f"rank {adapter.lora.rank}, alpha {adapter.lora.alpha}, {numbers:,} numbers"),
        (
            "inner loop",
            f"{inner.steps} steps on {' and '.join(inner.adapt)} by the loss of the {inner.loss}, {inner.head} head",
        ),
        *((name.replace("_", " "), f"{float(value):.3g}") for name, value in head_scalars(adapter.parameters).items()),
        *_tasks(adapter),
        *_training(record),
        *_results(record),
        ("written with", ", ".join(f"{name} {number}" for name, number in sorted(adapter.versions.items()) if number)),
    ]
    if fitted := adapter.fitted:
        stored = "not stored" if fitted.support is None else f"{len(fitted.support)} stored, readable by anybody"
        rows += [("classes", f"{len(fitted.classes)}: {', '.join(map(plain, fitted.classes[:20]))}")]
        rows += [("support texts", stored)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{plain(name):<{width}}  {plain(text)}" for name, text in rows)


def _tasks(adapter: Adapter) -> list[tuple[str, str]]:
    if adapter.inner.conditioning is None:
        return []
    rows = [("task encoder", conditioning_of(asdict(adapter.inner.conditioning)))]
    if (known := adapter.known_tasks) is None:
        return [*rows, ("known tasks", "no index of them")]
    return [*rows, ("known tasks", f"classes of the training corpora by name, readable by anybody: {known_of(known)}")]


def _training(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    algorithm = algorithm_of(record)
    if algorithm is None:
        return [("trained", "not meta-trained, or nothing is recorded of it")]
    rows = [("trained", f"{algorithm}, {record.get('episodes')} episodes")]
    for corpus in corpora_of(record):
        license_ = corpus["source"].get("license") or "licence not known"
        rows.append(("on", f"{corpus['name']}: {corpus['texts']} texts, {corpus['classes']} classes, {license_}"))
    return rows


def _results(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, row in record.get("results", {}).items():
        frozen, ours, paired = row["frozen"], row["meta_trained"], row["paired"]
        before, after = 100 * frozen["accuracy"], 100 * ours["accuracy"]
        interval = f"[{100 * paired['low']:+.2f}, {100 * paired['high']:+.2f}]"
        rows.append(("result", f"{name}: {before:.2f} → {after:.2f} {interval}"))
    return rows
