"""Writes docs/settings.md from the docstrings of the settings: python docs/settings.py."""

import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path

from textmeta import CorpusSettings, EpisodeSettings, MetaTrainer
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.lora import LoraSettings
from textmeta.meta.initialisation import LearnerSettings
from textmeta.training import plain_help

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Settings

Every setting there is, from the docstrings in the code (`python docs/settings.py` writes this page). A setting has the
same name and default in Python, in a YAML file, and as an option of `textmeta train`, which lists them with `--help`.
"""
SECTIONS = {
    MetaTrainer: "`textmeta.MetaTrainer`: a run of meta-training ([training.md](training.md)).",
    EncoderSettings: "`encoder` of a run (`textmeta.encoder.encoder`).",
    LoraSettings: "`lora` of a run (`textmeta.encoder.lora`).",
    LearnerSettings: "`learner` of a run (`textmeta.meta.initialisation`).",
    CorpusSettings: "`textmeta.CorpusSettings`: what `textmeta.load_corpus` reads.",
    EpisodeSettings: "`textmeta.EpisodeSettings`: episodes of an `EpisodeSampler`, to judge adapters by.",
}


def described(kind: type) -> dict[str, str]:
    """Return what the docstring of a dataclass says of each field."""
    arguments = inspect.cleandoc(kind.__doc__ or "").split("Args:\n", 1)[1].split("\n\n")[0]
    found = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(arguments)):
        name, _, text = entry.partition(":")
        found[name] = plain_help(" ".join(text.split())).replace("|", "\\|")
    return found


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for kind, says in SECTIONS.items():
        parts += [f"## {kind.__name__}\n", f"{says}\n", "| setting | default | what it is |", "|---|---|---|"]
        texts = described(kind)
        for field in fields(kind):
            if field.name == "long_texts":  # is for classifiers
                continue
            default = "as below" if field.default_factory is not MISSING else f"`{field.default!r}`"
            parts.append(
                f"| `{field.name}` | {'' if field.default is MISSING == field.default_factory else default} "
                f"| {texts[field.name]} |"
            )
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
