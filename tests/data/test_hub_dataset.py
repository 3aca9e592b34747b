"""Corpora of the Hub, through the real `datasets` and a local Hub."""

import json
import re
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from tests.hub.server import TOKEN, HubServer
from textmeta import CorpusSettings, load_corpus
from textmeta.data.class_splits import load_parts
from textmeta.errors import DataError, SettingsError

ROWS: list[tuple[str, object]] = [
    ("what is my balance", 0),
    ("show my balance", 0),
    ("my card is lost", 1),
    ("new card please", 1),
]


def jsonl(rows: list[tuple[str, object]], label: str = "label") -> bytes:
    return "".join(json.dumps({"text": text, label: value, "id": 1}) + "\n" for text, value in rows).encode()


@pytest.fixture
def intents(hub: HubServer) -> str:
    """The commit of a dataset with two splits and a licence; there is another, whose labels are numbers."""
    hub.add_repo("lab/plain", {"train.jsonl": jsonl(ROWS), "test.jsonl": jsonl(ROWS[1:3])}, repo_type="dataset")
    files = {
        "README.md": b"---\nlicense: cc-by-4.0\n---\n",
        "train.csv": b"text,label\nwhat is my balance,balance\nmy card is lost,card\n",
        "test.csv": b"text,label\nnew card please,card\n",
    }
    return hub.add_repo("lab/intents", files, repo_type="dataset")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_corpus_of_the_hub(hub: HubServer, intents: str, streaming: bool) -> None:
    corpus = load_corpus(CorpusSettings("lab/intents", streaming=streaming))
    assert list(corpus.texts) == ["what is my balance", "my card is lost"]
    assert corpus.class_names == ("balance", "card")
    assert corpus.source == {
        "dataset": "lab/intents",
        "commit": intents,
        "license": "cc-by-4.0",
        **({"streaming": True} if streaming else {}),
    }
    both = load_corpus(CorpusSettings("lab/intents", split="train+test", streaming=streaming))
    assert len(both) == 3


def test_whole_and_streamed_are_the_same_corpus(hub: HubServer, intents: str) -> None:
    settings = [CorpusSettings("lab/plain", streaming=streaming) for streaming in (False, True)]
    whole, streamed = map(load_corpus, settings)
    assert whole.sha256 == streamed.sha256
    assert whole.class_names == ("0", "1")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_class_names_of_the_datasets_own_features(hub: HubServer, tmp_path: Path, streaming: bool) -> None:
    features = datasets.Features(
        {"utterance": datasets.Value("string"), "intent": datasets.ClassLabel(names=["balance", "card"])}
    )
    rows = [{"utterance": text, "intent": label} for text, label in ROWS]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    files = {"data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes()}
    hub.add_repo("lab/parquet", files, repo_type="dataset")
    settings = CorpusSettings("lab/parquet", text_column="utterance", label_column="intent", streaming=streaming)
    assert load_corpus(settings).class_names == ("balance", "card")


def test_stream_of_first_rows_stops_there(hub: HubServer) -> None:
    rows: list[tuple[str, object]] = [(f"text {number} " + "word " * 200, str(number % 7)) for number in range(20_000)]
    hub.add_repo("lab/large", {"train.jsonl": jsonl(rows)}, repo_type="dataset")
    corpus = load_corpus(CorpusSettings("lab/large", streaming=True, rows=100))
    assert len(corpus) == 100
    assert corpus.texts[99].startswith("text 99 ")
    with pytest.raises(SettingsError, match="rows must be at least 1, given 0"):
        CorpusSettings("lab/large", rows=0)


def test_stream_of_first_rows_downloads_a_part_alone(hub: HubServer) -> None:
    content = jsonl([("word " * 200 + str(number), str(number % 7)) for number in range(60_000)])
    hub.add_repo("lab/large", {"train.jsonl": content}, repo_type="dataset")
    load_corpus(CorpusSettings("lab/large", streaming=True, rows=100))
    calls = [call for call in hub.requests if call.method == "GET" and "/storage/" in call.path]
    ranges = [call.headers.get("range", "") for call in calls]
    sizes = [int(end) - int(start) + 1 for start, end in re.findall(r"bytes=(\d+)-(\d+)", " ".join(ranges))]
    assert 0 < sum(sizes) < 0.6 * len(content), "`datasets` reads the first block twice: for the columns, for the rows"
    assert len(sizes) == len(ranges), "none without an end"


def test_first_rows_of_a_sorted_dataset_have_few_classes_and_no_empty_one(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    rows = [{"text": f"text {number}", "label": number // 4} for number in range(12)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    hub.add_repo("lab/sorted", {"train.parquet": (tmp_path / "train.parquet").read_bytes()}, repo_type="dataset")
    assert load_corpus(CorpusSettings("lab/sorted", rows=6)).class_names == ("a", "b")
    assert "the first 6 rows have 2 of its 3 classes" in caplog.text


@pytest.mark.parametrize(
    ("written", "found"),
    [("mit", "mit"), ("[mit, apache-2.0]", "mit, apache-2.0"), ("1.0", "1.0"), ("[mit, null]", "mit"), ("null", None),
     ("other\nlicense_name: house-rules", "house-rules")],
)  # fmt: skip
def test_licence_is_what_the_card_says(hub: HubServer, written: str, found: str | None) -> None:
    files = {"README.md": f"---\nlicense: {written}\n---\n".encode(), "train.jsonl": jsonl(ROWS)}
    hub.add_repo("lab/licensed", files, repo_type="dataset")
    assert load_corpus(CorpusSettings("lab/licensed")).source.get("license") == found


def test_folder_of_the_same_name_is_not_taken_for_the_dataset(
    hub: HubServer, intents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab" / "intents").mkdir(parents=True)
    (tmp_path / "lab" / "intents" / "train.jsonl").write_bytes(jsonl(ROWS))
    monkeypatch.chdir(tmp_path)
    refused(r"there is a file or folder 'lab/intents' here", dataset="lab/intents")


def test_what_a_stream_cannot_do_is_said(hub: HubServer, intents: str) -> None:
    refused(
        r"whole splits alone, given 'train\[:4\]': set rows", dataset="lab/intents", split="train[:4]", streaming=True
    )
    with pytest.raises(SettingsError, match="text_column and label_column are the same: 'text'"):
        CorpusSettings("lab/intents", label_column="text")


def test_rows_limit_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(jsonl([(text, str(label)) for text, label in ROWS]))
    assert len(load_corpus(CorpusSettings(str(tmp_path / "mine.jsonl"), rows=3))) == 3


def test_revision_is_the_one_asked_for_and_its_commit_is_kept(hub: HubServer, intents: str) -> None:
    hub.tag("lab/intents", "v1", repo_type="dataset")
    newer = hub.commit("lab/intents", {"train.csv": b"text,label\nx,a\ny,b\nz,c\n"}, repo_type="dataset")
    tagged, main = (load_corpus(CorpusSettings("lab/intents", revision=revision)) for revision in ("v1", None))
    assert (len(tagged), tagged.source["commit"]) == (2, intents)
    assert (len(main), main.source["commit"]) == (3, newer)
    assert load_corpus(CorpusSettings("lab/intents", revision=intents)).sha256 == tagged.sha256


def test_source_goes_with_the_parts_of_a_class_split(hub: HubServer, intents: str) -> None:
    rows: list[tuple[str, object]] = [(f"text {number}", str(number % 8)) for number in range(40)]
    commit = hub.add_repo("lab/many", {"train.jsonl": jsonl(rows)}, repo_type="dataset")
    parts = load_parts([CorpusSettings("lab/many", split_seed=3)])
    assert parts["train"][0].source == {"dataset": "lab/many", "commit": commit, "split_seed": 3}


def test_offline_the_cache_serves(hub: HubServer, intents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    online = load_corpus(CorpusSettings("lab/intents"))
    for module, name in ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(module, name, True)
    seen = len(hub.requests)
    offline = load_corpus(CorpusSettings("lab/intents"))
    assert offline.sha256 == online.sha256
    assert "commit" not in offline.source, "nobody could be asked"
    assert len(hub.requests) == seen


def refused(message: str, **settings: object) -> None:
    with pytest.raises(DataError, match=message):
        load_corpus(CorpusSettings(**settings))  # type: ignore[arg-type]


def test_no_such_dataset(hub: HubServer) -> None:
    refused(
        r"there is no dataset 'lab/none' on the Hub.*For a local file, give a path that ends in", dataset="lab/none"
    )


def test_private_and_gated_datasets_say_how_to_get_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("tester/private", {"train.jsonl": jsonl(ROWS)}, repo_type="dataset", private=True)
    refused(r"'tester/private'.*private and no token was given: log in with `hf auth login`", dataset="tester/private")
    hub.add_repo("lab/gated", {"train.jsonl": jsonl(ROWS)}, repo_type="dataset", gated=True)
    refused(
        rf"'lab/gated' is a gated.*Ask for access at {hub.url}/datasets/lab/gated, then log in", dataset="lab/gated"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(load_corpus(CorpusSettings("tester/private"))) == 4


def test_no_such_revision(hub: HubServer, intents: str) -> None:
    refused(r"dataset 'lab/intents' has no revision 'v9'", dataset="lab/intents", revision="v9")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_no_such_split_lists_those_there_are(hub: HubServer, intents: str, streaming: bool) -> None:
    refused(r"lab/intents.*'valid'.*train.*test", dataset="lab/intents", split="valid", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_no_such_column_lists_those_there_are(hub: HubServer, intents: str, streaming: bool) -> None:
    refused(r"no column 'utterance'.*\['text', 'label'\]", dataset="lab/intents", text_column="utterance",
            streaming=streaming)  # fmt: skip


def test_no_such_configuration_lists_those_there_are(hub: HubServer) -> None:
    card = "---\nconfigs: [{config_name: small, data_files: a.jsonl}, {config_name: plus, data_files: b.jsonl}]\n---\n"
    files = {"README.md": card.encode(), "a.jsonl": jsonl(ROWS[:2]), "b.jsonl": jsonl(ROWS)}
    hub.add_repo("lab/configs", files, repo_type="dataset")
    assert len(load_corpus(CorpusSettings("lab/configs", config="plus"))) == 4
    refused(r"lab/configs.*config large.*small.*plus", dataset="lab/configs", config="large")


def test_dataset_that_needs_a_script_says_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    script = f"open({str(canary)!r}, 'w')\nraise SystemExit\n"
    hub.add_repo("lab/script", {"script.py": script.encode()}, repo_type="dataset")
    refused(r"lab/script.*script of its own, which is never run.*refs/convert/parquet", dataset="lab/script")
    assert not canary.exists()


def test_row_that_cannot_be_used_is_named(hub: HubServer) -> None:
    hub.add_repo("lab/holes", {"train.jsonl": jsonl([*ROWS, ("", 1)])}, repo_type="dataset")
    refused(r"'lab/holes'.*row 4.*empty", dataset="lab/holes")
