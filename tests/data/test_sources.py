"""Corpora of local files, and of a local Hub through the real `datasets`."""

import csv
import json
import os
import re
import time
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from tests.given import Logged, Patch
from tests.hub.server import TOKEN, Fault, HubServer
from textmeta.data.corpus import Corpus, CorpusSettings, load_corpora, load_corpus
from textmeta.data.splits import load_parts
from textmeta.errors import DataError, SettingsError

ROWS = [
    {"text": "where is my card?", "label": "card"},
    {"text": 'I said "no", twice', "label": "refuse"},
    {"text": "größer, 更大", "label": "size"},
    {"text": "it got lost", "label": "card"},
]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: Patch) -> None:
    """Keep what the tests load out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return str(path)


def load(path: Path | str) -> Corpus:
    return load_corpus(str(path))


def write_rows(path: Path, kind: str) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    if kind == "csv":
        rows.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    elif kind == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, lines=kind == "lines")


KINDS = "json list", "json lines", "jsonl lines", "JSONL lines", "csv csv", "tsv csv", "parquet parquet"


@pytest.mark.parametrize(("suffix", "kind"), [kind.split() for kind in KINDS])
def test_file_of_each_kind_loads_to_the_same_corpus(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"corpus.{suffix}"
    write_rows(path, kind)
    corpus = load(path)
    assert list(corpus.texts) == [row["text"] for row in ROWS]
    assert corpus.class_names == ("card", "refuse", "size")
    assert corpus.labels.tolist() == [0, 1, 2, 0]
    assert corpus.name == "corpus"
    assert corpus.sha256 == Corpus.from_dataset(datasets.Dataset.from_list(ROWS), name="other").sha256


def test_columns_and_name_and_number_of_rows_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.csv", "id,utterance,label,intent\n1,a,no,x\n2,b,no,y\n3,c,no,z\n")
    settings = CorpusSettings(path, name="mine", rows=2, text_column="utterance", label_column="intent")
    corpus = load_corpus(settings)
    assert (corpus.name, list(corpus.texts), corpus.class_names) == ("mine", ["a", "b"], ("x", "y"))


@pytest.mark.parametrize("between", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
def test_separator_is_that_of_the_first_row(tmp_path: Path, suffix: str, between: str, mark: str) -> None:
    rows = [("label", "text"), ("card", "lost, stolen; or | gone"), ("fee", "what, again?")]
    path = tmp_path / f"c{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file, delimiter=between).writerows(rows)
    assert list(load(path).texts) == [text for _, text in rows[1:]]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["texts.txt", "texts.xlsx", "texts.CSV.gz"])
def test_file_of_another_kind_is_told_what_is_read(tmp_path: Path, name: str, there: bool) -> None:
    if there:
        (tmp_path / name).write_bytes(b"text")
    with pytest.raises(DataError, match=rf"^cannot read .*{name}: expected a file that ends in .json, .*CSV"):
        load(tmp_path / name)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "c.csv", "csv")
    corpus = load("~/c.csv")
    assert corpus.texts == load(tmp_path / "c.csv").texts
    assert corpus.source == {"dataset": "c.csv"}


@pytest.mark.parametrize(("suffix", "between"), [(".csv", ","), (".tsv", "\t")])
def test_cells_of_a_csv_stay_text(tmp_path: Path, suffix: str, between: str) -> None:
    # a CSV has no types: "01" there is the string that it is in JSON, and "NA" is no null
    rows = [["text", "label"], ["null", "NA"], ["NA", "None"], ["NaN", "null"], ["007", "01"]]
    corpus = load(write(tmp_path / f"corpus{suffix}", "".join(between.join(row) + "\n" for row in rows)))
    assert list(corpus.texts) == ["null", "NA", "NaN", "007"]
    assert corpus.class_names == ("01", "NA", "None", "null")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("role", ["text_column", "label_column"])
def test_missing_column_is_named_with_the_columns_there_are(tmp_path: Path, role: str, kind: str) -> None:
    write_rows(tmp_path / f"c.{kind}", kind.replace("jsonl", "lines"))
    with pytest.raises(DataError, match=rf"/c\.{kind}.* column 'body'.*; its columns are \[?'text', 'label'"):
        load_corpus(CorpusSettings(str(tmp_path / f"c.{kind}"), **{role: "body"}))


@pytest.mark.parametrize("rows", ["a,x\nb,\nc,y\n", "a,x\n,y\n"], ids=["label", "text"])
def test_empty_cell_of_a_csv_is_named_with_its_row(tmp_path: Path, rows: str) -> None:
    # a row without a label must not become the one row of a class without a name
    with pytest.raises(DataError, match=r"row 1: .* is empty"):
        load(write(tmp_path / "corpus.csv", f"text,label\n{rows}"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", None, r"no such file: .*c\.csv"),
        ("c.json", "", r"c\.json: corpus 'c' is empty: 0 rows"),
        ("c.csv", "", r"c\.csv: expected a column 'text'"),
        ("c.parquet", "", r"c\.parquet: ArrowInvalid: .*Parquet file size is 0"),
        ("c.csv", "text,label\n", r"c\.csv: corpus 'c' is empty: 0 rows"),
        ("c.json", "[]", r"c\.json: corpus 'c' is empty: 0 rows"),
        ("c.jsonl", "\n", r"c\.jsonl: corpus 'c' is empty: 0 rows"),
        ("c.json", '[\n{"text": "a", "label": "x"},\n{"text": "b"', r"c\.json, line 3: Expecting"),
        ("c.jsonl", '{"text": "a", "label": "x"}\n{"text":\n', r"c\.jsonl, line 2: Expecting"),
        ("c.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', r"c\.jsonl, line 2: no column 'label'.* 'text'"),
        ("c.jsonl", '{"text": "a", "label": "x"}\n["b", "x"]\n', r"c\.jsonl, line 2: expected a string as 'text'"),
        ("c.jsonl", '{"text": 3, "label": "x"}\n', r"c\.jsonl, line 1: expected a string as 'text'"),
        ("c.jsonl", '{"text": "a", "label": 0.5}\n', r"c\.jsonl: corpus 'c', row 0: label is float 0.5, expected"),
        ("c.csv", "text,label\na,x\nb,y,z,w\n", r"c\.csv, line 3: expected .* no more cells than columns"),
        ("c.csv", "text,label\na,x,\nb,y,\n", r"c\.csv, line 2: expected .* no more cells than columns"),
        ("c.csv", 'text,label\na,x\n"b,y\nc,z\n', r"c\.csv, line 4: unexpected end of data"),
        ("c.csv", "text,text,label\na,b,x\n", r"c\.csv: expected a column 'text', and none twice; its columns are"),
        ("c.csv", "\udcff\udcfe\x00", r"c\.csv, line 1: expected lines, CSV or JSON Lines in UTF-8"),
        ("c.jsonl", "PK\x03\x04", r"c\.jsonl, line 1: Expecting value"),
        ("c.parquet", "no parquet", r"c\.parquet: ArrowInvalid: .*not a parquet file"),
    ],
)
def test_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(DataError, match=rf"^({tmp_path}/)?{message}"):
        load(tmp_path / name)


def test_odd_corpora_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\r\n" for row in [
        {"text": "2020-01-01", "label": 7, "more": [1, {"a": None}]},
        {"text": "x" * 200_000, "label": "7"},
        {"label": "2021-05-05", "text": "a\u2028b\x85"},
    ]))  # fmt: skip
    corpus = load(tmp_path / "c.jsonl")
    assert list(corpus.texts) == ["2020-01-01", "x" * 200_000, "a\u2028b\x85"]
    assert corpus.class_names == ("2021-05-05", "7")
    path = write(tmp_path / "c.csv", 'text,label,,\n"two\nlines, ""quoted""",x,1,2\n\nplain,y,,\n')
    assert list(load(path).texts) == ['two\nlines, "quoted"', "plain"]


def test_a_folder_is_a_corpus_a_file(tmp_path: Path, caplog: Logged) -> None:
    for name in ("b.jsonl", "a.csv", "c.parquet"):
        write_rows(tmp_path / name, {"b.jsonl": "lines"}.get(name, name[2:]))
    for name in ("README.md", "notes.txt", "a.splits.json", ".hidden.csv"):
        write(tmp_path / name, "{}")
    (tmp_path / "test.csv").mkdir()
    found = load_corpora(tmp_path)
    assert [corpus.name for corpus in found] == ["a", "b", "c"]
    assert len({corpus.sha256 for corpus in found}) == 1
    assert found[0].source == {"dataset": "a.csv"}
    assert "3 corpora; not read: 'README.md', 'a.splits.json', 'notes.txt', 'test.csv'" in caplog.text
    one = CorpusSettings(str(tmp_path), license="mit")
    named = load_corpora([str(tmp_path / "b.jsonl"), one])
    assert [corpus.name for corpus in named] == ["b", "a", "b", "c"]
    assert [corpus.source.get("license") for corpus in named] == [None, "mit", "mit", "mit"]
    write(tmp_path / "b.jsonl", "{")
    with pytest.raises(DataError, match=rf"^{tmp_path}/b\.jsonl, line 1: "):
        load_corpora(tmp_path)
    with pytest.raises(DataError, match=r"test\.csv has no corpus: no file there ends in \.json"):
        load_corpora(str(tmp_path / "test.csv"))


def test_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    """Even where its name, size and time are those of the file that was read before."""
    path = tmp_path / "c.csv"
    path.write_text("text,label\nold,a\n")
    stamp = path.stat()
    assert list(load_corpus(CorpusSettings(str(path))).texts) == ["old"]
    path.write_text("text,label\nnew,a\n")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert list(load_corpus(CorpusSettings(str(path))).texts) == ["new"]


REQUESTS = [("what is my balance", 0), ("show my balance", 0), ("my card is lost", 1), ("new card please", 1)]


def jsonl(rows: list[tuple[str, object]], label: str = "label") -> bytes:
    return "".join(json.dumps({"text": text, label: value, "id": 1}) + "\n" for text, value in rows).encode()


def parquet(path: Path, rows: list[dict], label: str, names: list[str]) -> bytes:
    """Return a file whose labels are numbers with these names."""
    datasets.Dataset.from_list(rows).cast_column(label, datasets.ClassLabel(names=names)).to_parquet(path)
    return path.read_bytes()


@pytest.fixture
def intents(hub: HubServer) -> str:
    """The commit of a dataset with two splits and a licence; there is another, whose labels are numbers."""
    hub.add_repo("lab/plain", {"train.jsonl": jsonl(REQUESTS), "test.jsonl": jsonl(REQUESTS[1:3])}, repo_type="dataset")
    files = {
        "README.md": b"---\nlicense: cc-by-4.0\n---\n",
        "train.csv": b"text,label\nwhat is my balance,balance\nmy card is lost,card\n",
        "test.csv": b"text,label\nnew card please,card\n",
    }
    return hub.add_repo("lab/intents", files, repo_type="dataset")


@pytest.mark.parametrize("rows", [None, 9], ids=["whole", "streamed"])
def test_corpus_of_the_hub(hub: HubServer, intents: str, rows: int | None) -> None:
    corpus = load_corpus(CorpusSettings("lab/intents", rows=rows))
    assert list(corpus.texts) == ["what is my balance", "my card is lost"]
    assert corpus.class_names == ("balance", "card")
    told = {} if rows is None else {"rows": rows}
    assert corpus.source == {"dataset": "lab/intents", "commit": intents, "license": "cc-by-4.0", **told}
    assert len(load_corpus(CorpusSettings("lab/intents", split="train+test", rows=rows))) == 3


def test_whole_and_streamed_are_the_same_corpus(hub: HubServer, intents: str) -> None:
    whole, streamed = (load_corpus(CorpusSettings("lab/plain", rows=rows)) for rows in (None, 9))
    assert whole.sha256 == streamed.sha256
    assert whole.class_names == ("0", "1")


@pytest.mark.parametrize("rows", [None, 9], ids=["whole", "streamed"])
def test_class_names_of_the_datasets_own_features(hub: HubServer, tmp_path: Path, rows: int | None) -> None:
    examples = [{"utterance": text, "intent": label} for text, label in REQUESTS]
    content = parquet(tmp_path / "train.parquet", examples, "intent", ["balance", "card"])
    files = {"data/train-00000-of-00001.parquet": content}
    hub.add_repo("lab/parquet", files, repo_type="dataset")
    settings = CorpusSettings("lab/parquet", rows=rows, text_column="utterance", label_column="intent")
    assert load_corpus(settings).class_names == ("balance", "card")


def test_first_rows_are_downloaded_alone(hub: HubServer) -> None:
    content = jsonl([(f"text {number} " + "word " * 200, str(number % 7)) for number in range(60_000)])
    hub.add_repo("lab/large", {"train.jsonl": content}, repo_type="dataset")
    corpus = load_corpus(CorpusSettings("lab/large", rows=100))
    assert len(corpus) == 100
    assert corpus.texts[99].startswith("text 99 ")
    calls = [call for call in hub.requests if call.method == "GET" and "/resolve/" in call.path]
    ranges = [call.headers.get("range", "") for call in calls]
    sizes = [int(end) - int(start) + 1 for start, end in re.findall(r"bytes=(\d+)-(\d+)", " ".join(ranges))]
    assert 0 < sum(sizes) < 0.6 * len(content), "`datasets` reads the first block twice: for the columns, for the rows"
    assert len(sizes) == len(ranges), "none without an end"


def test_first_rows_of_a_sorted_dataset_have_no_empty_class(hub: HubServer, tmp_path: Path, caplog: Logged) -> None:
    rows = [{"text": f"text {number}", "label": number // 4} for number in range(12)]
    content = parquet(tmp_path / "train.parquet", rows, "label", ["a", "b", "c"])
    hub.add_repo("lab/sorted", {"train.parquet": content}, repo_type="dataset")
    assert load_corpus(CorpusSettings("lab/sorted", rows=6)).class_names == ("a", "b")
    assert "the first 6 rows have 2 of its 3 classes" in caplog.text


@pytest.mark.parametrize(
    ("written", "found"),
    [("mit", "mit"), ("[mit, apache-2.0]", "mit, apache-2.0"), ("1.0", "1.0"), ("[mit, null]", "mit"), ("null", None),
     ("other\nlicense_name: house-rules", "house-rules")],
)  # fmt: skip
def test_licence_is_what_the_card_says(hub: HubServer, written: str, found: str | None) -> None:
    files = {"README.md": f"---\nlicense: {written}\n---\n".encode(), "train.jsonl": jsonl(REQUESTS)}
    hub.add_repo("lab/licensed", files, repo_type="dataset")
    assert load_corpus(CorpusSettings("lab/licensed")).source.get("license") == found


def test_folder_of_the_same_name_is_not_taken_for_the_dataset(intents: str, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "lab" / "intents").mkdir(parents=True)
    (tmp_path / "lab" / "intents" / "train.jsonl").write_bytes(jsonl(REQUESTS))
    monkeypatch.chdir(tmp_path)
    refused(r"there is a file or folder 'lab/intents' here", dataset="lab/intents")


def test_settings_that_cannot_be_are_said(hub: HubServer, intents: str) -> None:
    refused(r"with rows, a split must be a whole one, given 'train\[:4\]'", dataset="lab/intents", split="train[:4]",
            rows=2)  # fmt: skip
    with pytest.raises(SettingsError, match="text_column and label_column are the same: 'text'"):
        CorpusSettings("lab/intents", label_column="text")
    with pytest.raises(SettingsError, match="rows must be a whole number from 1, given 0"):
        CorpusSettings("lab/large", rows=0)


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
    parts = load_parts([CorpusSettings("lab/many", name="many")], texts=5)
    assert parts["train"][0].source == {"dataset": "lab/many", "commit": commit, "name": "many"}


def test_offline_the_cache_serves(hub: HubServer, intents: str, monkeypatch: Patch) -> None:
    online = load_corpus(CorpusSettings("lab/intents"))
    for module, name in ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(module, name, True)
    seen = len(hub.requests)
    offline = load_corpus(CorpusSettings("lab/intents"))
    assert offline.sha256 == online.sha256
    assert "commit" not in offline.source, "nobody could be asked"
    assert len(hub.requests) == seen


@pytest.mark.parametrize("rows", [None, 1], ids=["whole", "streamed"])
def test_silent_hub_is_not_waited_for(hub: HubServer, intents: str, monkeypatch: Patch, rows: int | None) -> None:
    online = load_corpus(CorpusSettings("lab/intents"))
    monkeypatch.setattr("textmeta.data.sources.DEADLINE", 0.2)
    hub.faults.append(Fault("silence", path=".", times=10**6))
    began, seen = time.monotonic(), len(hub.requests)
    assert load_corpus(CorpusSettings("lab/intents", rows=rows)).texts[0] == online.texts[0], "the cache serves"
    refused(
        r"cannot be reached \(ReadTimeout.*'lab/plain' \(revision main\) is not in the cache", dataset="lab/plain",
        rows=rows,
    )  # fmt: skip
    assert len(hub.requests) == seen + 2, "each asked once"
    assert time.monotonic() - began < 5


def refused(message: str, **settings: object) -> None:
    with pytest.raises(DataError, match=message):
        load_corpus(CorpusSettings(**settings))  # type: ignore[arg-type]


def test_private_and_gated_datasets_say_how_to_get_in(hub: HubServer, monkeypatch: Patch) -> None:
    hub.add_repo("tester/private", {"train.jsonl": jsonl(REQUESTS)}, repo_type="dataset", private=True)
    refused(r"'tester/private'.*private and no token was given: log in with `hf auth login`", dataset="tester/private")
    hub.add_repo("lab/gated", {"train.jsonl": jsonl(REQUESTS)}, repo_type="dataset", gated=True)
    refused(
        rf"'lab/gated' is a gated.*Ask for access at {hub.url}/datasets/lab/gated, then log in", dataset="lab/gated"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(load_corpus(CorpusSettings("tester/private"))) == 4


@pytest.mark.parametrize("rows", [None, 9], ids=["whole", "streamed"])
def test_no_such_split_or_column_lists_those_there_are(hub: HubServer, intents: str, rows: int | None) -> None:
    refused(r"lab/intents.*'valid'.*train.*test", dataset="lab/intents", split="valid", rows=rows)
    refused(r"no column 'utterance'.*\['text', 'label'\]", dataset="lab/intents", text_column="utterance", rows=rows)


def test_no_such_dataset_or_revision(hub: HubServer, intents: str) -> None:
    refused("there is no dataset 'lab/none' on the Hub.*For a local file, give a path that ends", dataset="lab/none")
    refused("dataset 'lab/intents' has no revision 'v9'", dataset="lab/intents", revision="v9")


def test_no_such_configuration_lists_those_there_are(hub: HubServer) -> None:
    card = "---\nconfigs: [{config_name: small, data_files: a.jsonl}, {config_name: plus, data_files: b.jsonl}]\n---\n"
    files = {"README.md": card.encode(), "a.jsonl": jsonl(REQUESTS[:2]), "b.jsonl": jsonl(REQUESTS)}
    hub.add_repo("lab/configs", files, repo_type="dataset")
    assert len(load_corpus(CorpusSettings("lab/configs", config="plus"))) == 4
    refused(r"lab/configs.*config large.*small.*plus", dataset="lab/configs", config="large")


def test_dataset_that_needs_a_script_says_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    script = f"open({str(canary)!r}, 'w')\nraise SystemExit\n"
    hub.add_repo("lab/script", {"script.py": script.encode()}, repo_type="dataset")
    refused(r"lab/script.*script of its own, which is never run.*refs/convert/parquet", dataset="lab/script")
    assert not canary.exists()
