"""transformers and datasets on the local Hub, as users call them."""

import io
import json
import logging
from pathlib import Path

import datasets
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import AutoModel, AutoTokenizer

from tests.hub.server import READ_TOKEN, TOKEN, Fault, HubServer

DATA = "tester/data"
ROWS = [{"text": f"text {number}", "label": number % 3} for number in range(30)]


def as_jsonl(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, object]]) -> bytes:
    return ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)).encode()


def as_parquet(rows: list[dict[str, object]]) -> bytes:
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


FORMATS = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}


@pytest.fixture
def model_files(tiny_model: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(tiny_model).iterdir()}


@pytest.mark.parametrize("private", [False, True])
def test_model(hub: HubServer, tiny_model: str, model_files: dict[str, bytes], private: bool) -> None:
    hub.add_repo("tester/bert", model_files, private=private)
    token = READ_TOKEN if private else None
    model = AutoModel.from_pretrained("tester/bert", token=token, add_pooling_layer=False)
    expected = AutoModel.from_pretrained(tiny_model, add_pooling_layer=False)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    assert len(AutoTokenizer.from_pretrained("tester/bert", token=token)) == len(
        AutoTokenizer.from_pretrained(tiny_model)
    )
    assert (Path(constants.HF_HUB_CACHE) / "models--tester--bert").is_dir()


def test_model_that_may_not_be_had(hub: HubServer, model_files: dict[str, bytes]) -> None:
    hub.add_repo("someone/bert", model_files, gated=True)
    with pytest.raises(OSError, match="gated repo"):
        AutoModel.from_pretrained("someone/bert", token=TOKEN)
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModel.from_pretrained("tester/none")


def test_model_whose_download_is_truncated(hub: HubServer, model_files: dict[str, bytes]) -> None:
    hub.add_repo("tester/bert", model_files)
    hub.faults = [Fault("truncate", path="model.safetensors", after=1000, times=9)]
    with pytest.raises(OSError, match="Consistency check failed"):
        AutoModel.from_pretrained("tester/bert")


def test_model_is_pushed(hub: HubServer, tiny_model: str, model_files: dict[str, bytes]) -> None:
    AutoModel.from_pretrained(tiny_model, add_pooling_layer=False).push_to_hub("tester/pushed", token=TOKEN)
    files = hub.files("tester/pushed")
    assert files["model.safetensors"] == model_files["model.safetensors"]
    assert json.loads(files["config.json"])["hidden_size"] == 32


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_data(hub: HubServer, kind: str, streaming: bool) -> None:
    write = FORMATS[kind]
    hub.add_repo(DATA, {f"train.{kind}": write(ROWS), f"test.{kind}": write(ROWS[:6])}, repo_type="dataset")
    loaded = load_dataset(DATA, streaming=streaming)
    assert list(loaded["train"]) == ROWS
    assert list(loaded["test"]) == ROWS[:6]
    if not streaming:
        files = loaded["train"].cache_files
        assert files
        assert all(constants.HF_HOME in file["filename"] for file in files)


def test_data_of_a_revision(hub: HubServer) -> None:
    first = hub.add_repo(DATA, {"train.jsonl": as_jsonl(ROWS)}, repo_type="dataset")
    hub.commit(DATA, {"train.jsonl": as_jsonl(ROWS[:5])}, repo_type="dataset")
    assert len(load_dataset(DATA, split="train", revision=first)) == 30
    assert len(load_dataset(DATA, split="train")) == 5


@pytest.mark.parametrize("streaming", [False, True])
def test_data_with_a_card(hub: HubServer, streaming: bool) -> None:
    card = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: parts/a-*.jsonl}
- config_name: big
  default: true
  data_files:
  - {split: train, path: parts/*.jsonl}
dataset_info:
- config_name: small
  features:
  - {name: text, dtype: string}
  - name: label
    dtype:
      class_label: {names: {'0': bad, '1': fair, '2': good}}
---
# Data
"""
    parts = {
        f"parts/{name}.jsonl": as_jsonl(ROWS[start : start + 10])
        for start, name in ((0, "a-1"), (10, "a-2"), (20, "b"))
    }
    hub.add_repo(DATA, {"README.md": card.encode(), **parts}, repo_type="dataset")
    small = load_dataset(DATA, "small", split="train", streaming=streaming)
    assert [row["text"] for row in small] == [row["text"] for row in ROWS[:20]]
    assert small.features["label"].names == ["bad", "fair", "good"]
    assert len(list(load_dataset(DATA, split="train", streaming=streaming))) == 30


def test_private_data(hub: HubServer) -> None:
    hub.add_repo(DATA, {"train.jsonl": as_jsonl(ROWS)}, repo_type="dataset", private=True)
    with pytest.raises(datasets.exceptions.DatasetNotFoundError):
        load_dataset(DATA)
    assert load_dataset(DATA, split="train", token=READ_TOKEN).to_list() == ROWS


def test_data_with_a_script(hub: HubServer) -> None:
    hub.add_repo(DATA, {"data.py": b"raise SystemExit\n"}, repo_type="dataset")
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        load_dataset(DATA)


def test_data_comes_although_the_connection_fails(hub: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    rows = ROWS * 2000
    hub.add_repo(DATA, {"train.jsonl": as_jsonl(rows)}, repo_type="dataset")
    hub.faults = [
        Fault("status", path="/tree/|/paths-info/", times=1),
        Fault("cut", path="train.jsonl", after=1000),
    ]
    with caplog.at_level(logging.ERROR):
        assert load_dataset(DATA, split="train").num_rows == len(rows)
    assert all(fault.times == 0 for fault in hub.faults)


def test_data_is_pushed(hub: HubServer) -> None:
    datasets.Dataset.from_list(ROWS).push_to_hub(DATA, token=TOKEN)
    assert load_dataset(DATA, split="train").to_list() == ROWS


def test_offline_again() -> None:
    """Without the fixture nothing is asked of any Hub."""
    with pytest.raises((OfflineModeIsEnabled, ConnectionError)):
        load_dataset("tester/in-no-cache")
    assert constants.HF_HUB_OFFLINE
    assert constants.ENDPOINT == "https://huggingface.co"
