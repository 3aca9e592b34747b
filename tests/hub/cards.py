"""The Hub's rules for the metadata at the top of a README.md, as far as our cards go."""

import re
from typing import Any

import yaml

TEXTS = ("library_name", "pipeline_tag")
ID = r"(?!.*(?:--|\.\.))(?:[\w-]+/)?[\w.-]+"
LISTS = {  # of texts that match; the last three may be one text
    "tags": ".*",
    "metrics": ".*",
    "license": "apache-2.0|mit|bsd-3-clause|cc0-1.0|cc-by(-nc)?(-sa|-nd)?-[234].0|(a|l)?gpl-3.0|other|unknown",
    "datasets": ID,
    "base_model": ID,
}
RELATIONS = ("adapter", "finetune", "merge", "quantized")


def metadata(content: str) -> dict[str, Any] | None:
    """The metadata of a card; None if it has none."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", content, re.DOTALL)
    value = yaml.safe_load(match[1]) if match else None
    return value if isinstance(value, dict) else None


def errors(content: str) -> list[str]:
    """What the Hub refuses the card of a model for."""
    try:
        card = metadata(content) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    found = [f'"{key}" must be a string' for key in TEXTS if not isinstance(card.get(key, ""), str)]
    for number, (key, pattern) in enumerate(LISTS.items()):
        value = card.get(key, [])
        items = [value] if isinstance(value, str) and number > 1 else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            found.append(f'"{key}" must be an array of strings')
        else:
            found += [f'"{key}" cannot be "{i}"' for i in items if not re.fullmatch(pattern, i, re.ASCII)]
    if card.get("base_model_relation", "adapter") not in RELATIONS:
        found.append(f'"base_model_relation" must be one of {RELATIONS}')
    return found
