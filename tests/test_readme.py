"""The README's Python runs as it stands."""

import csv
import re
from pathlib import Path

import pytest
import torch

from tests.hub.server import TOKEN, USER, HubServer
from textmeta.artifact import locate
from textmeta.artifact.store import save_adapter
from textmeta.data.corpus import Corpus
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.conditioning import ConditioningSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.initialisation import SCOPE
from textmeta.model.scope import RULE_SIZE
from textmeta.tasks import index_tasks

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_of_the_readme_runs(
    block: str, hub: HubServer, tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add_repo("lab/tiny", {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()})
    encoder = Encoder(EncoderSettings("lab/tiny", max_length=32))
    inner = InnerLoopSettings(conditioning=ConditioningSettings())
    start = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    known = index_tasks(encoder, [corpus], rows=3)
    save_adapter("demo-output", encoder, start, inner, {}, known_tasks=known)
    monkeypatch.setattr(locate, "SHIPPED", tmp_path / "adapters")
    save_adapter(tmp_path / "adapters" / "minilm-general", encoder, {**start, SCOPE: torch.ones(RULE_SIZE)}, inner, {})
    with open("intents.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["utterance", "intent"])
        writer.writerows((f"{word} {number}", word) for word in ("bal", "bel", "bil") for number in range(5))
    exec(compile(block.replace("your-name/", f"{USER}/"), "README.md", "exec"), {})


def test_the_readme_has_python() -> None:
    assert len(BLOCKS) == 6


def test_every_recipe_and_config_named_in_the_readme_exists() -> None:
    named = set(re.findall(r"recipes/[\w/]+\.(?:py|yaml)", README))
    assert named
    assert all((Path(__file__).parents[1] / path).is_file() for path in named)
