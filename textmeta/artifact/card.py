"""The model card, written from the training record."""

from collections.abc import Mapping
from typing import Any

__all__ = ["model_card"]


def model_card(meta: Mapping[str, Any]) -> str:
    """Return the model card (Markdown with the Hub's metadata block) of an adapter.

    Args:
        meta: the content of its ``textmeta.json``.
    """
    encoder, inner, record = meta["encoder"], meta["inner"], meta["record"]
    settings = record.get("settings", {})
    corpora = settings.get("train", {}).get("corpora", [])
    algorithm = settings.get("training", {}).get("algorithm", "none")
    lines = [
        "---",
        "library_name: textmeta",
        "pipeline_tag: text-classification",
        f"base_model: {encoder['model']}",
        "tags: [few-shot, meta-learning, lora]",
        "---",
        "",
        "# Meta-trained LoRA initialisation for few-shot text classification",
        "",
        f"Encoder: `{encoder['model']}` (revision {encoder['revision'] or 'default'}, {encoder['pooling']} pooling, "
        f"texts cut at {encoder['max_length']} tokens).",
        f"Algorithm: {algorithm}, {record.get('episodes', 0)} episodes; inner steps: {inner['steps']}.",
    ]
    lines += [
        f"Trained on: {corpus['name']} ({corpus['texts']} texts, {corpus['classes']} classes)." for corpus in corpora
    ]
    if results := record.get("results"):
        lines += ["", "| classes never seen in training | frozen prototypes | this adapter | difference, 95 % |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {name} | {100 * row['frozen']['accuracy']:.2f} | {100 * row['meta_trained']['accuracy']:.2f} | "
            f"{100 * row['paired']['low']:+.2f} to {100 * row['paired']['high']:+.2f} |"
            for name, row in results.items()
        ]
    lines += [
        "",
        "```python",
        "from textmeta import FewShotClassifier",
        "",
        'clf = FewShotClassifier.from_pretrained("path/to/this/folder")',
        'clf.fit(["I lost my card", "my card was stolen", "what is my balance?"], ["lost", "lost", "balance"])',
        'clf.predict(["someone took my wallet"])',
        "```",
        "",
    ]
    return "\n".join(lines)
