"""Adapters through a local Hub, with the real client: push, pull, errors, faults, and what a name means."""

import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitInfo, ModelCard, constants
from safetensors.torch import load, save

from tests.given import Logged, Patch
from tests.hub.server import READ_TOKEN, TOKEN, Fault, HubServer
from tests.sharing.made import contents, fit, logits, make_adapter, make_reader
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, EncoderError, HubError, HubUnreachableError
from textmeta.hub import HubAccess, check_reachable
from textmeta.meta.adapter import Adapter
from textmeta.sharing import locate as locating
from textmeta.sharing.folder import MANIFEST
from textmeta.sharing.locate import Location, read_located
from textmeta.sharing.push import push_adapter, push_folder
from textmeta.sharing.store import Fitted, load_adapter, save_adapter

ENCODER, ADAPTER = "lab/tiny", "tester/adapter"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: Patch) -> None:
    monkeypatch.setattr("textmeta.hub.WAITS", (0, 0, 0))


@pytest.fixture
def encoder_on_hub(hub: HubServer, tiny_model: str) -> str:
    """The commit of the tiny encoder's repository, which also holds what must never be downloaded."""
    files = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
    return hub.add_repo(
        ENCODER, {**files, "pytorch_model.bin": b"pickled", "modeling.py": b"code", "onnx/a.json": b"{}"}
    )


@pytest.fixture
def pushed_reader(encoder_on_hub: str) -> TokenStateReader:
    return make_reader(ENCODER)


@pytest.fixture
def pushed(pushed_reader: TokenStateReader) -> Adapter:
    """An adapter of the encoder on the Hub, to be pushed."""
    return make_adapter(pushed_reader)


@pytest.fixture
def fitted(pushed_reader: TokenStateReader, pushed: Adapter) -> Fitted:
    return fit(pushed_reader, pushed, keep=True)


def push(adapter: Adapter, fitted: Fitted | None = None, to: str = ADAPTER, **options: Any) -> CommitInfo:
    return push_adapter(adapter, fitted, to, **{"token": TOKEN, **options})


def loaded_logits(name: str = ADAPTER, access: HubAccess | None = None, **options: Any) -> torch.Tensor:
    """Load a fitted classifier with its encoder; return what it makes of the queries."""
    adapter, fitted = load_adapter(name, access=access, **options)
    return logits(adapter.load_reader(access=access), adapter, fitted)


def found_at(name: str | Path, **options: Any) -> Location:
    return read_located(name, **options)[1]


def snapshot(name: str = ADAPTER) -> Path:
    return next((Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").iterdir())


def test_round_trip_through_the_hub_is_exact_to_the_bit(
    hub: HubServer, pushed_reader: TokenStateReader, pushed: Adapter, fitted: Fitted, encoder_on_hub: str
) -> None:
    done = push(pushed, fitted, private=False, commit_message="the first")
    assert done.commit_message == "the first"
    assert torch.equal(loaded_logits(), logits(pushed_reader, pushed, fitted))
    adapter, found = load_adapter(ADAPTER)
    where = found_at(ADAPTER)
    assert (where.kind, where.commit, adapter.commit) == ("hub", done.oid, encoder_on_hub)
    assert vars(found.inputs) == vars(fitted.inputs)
    push(adapter, found, "tester/again")
    again = hub.files("tester/again")
    again["README.md"] = again["README.md"].replace(b"tester/again", b"tester/adapter")
    assert again == hub.files(ADAPTER), "pushed again with everything that it had"


def test_nothing_but_safetensors_and_text_is_downloaded(hub: HubServer, pushed: Adapter) -> None:
    push(pushed)
    hub.commit(ADAPTER, {"pytorch_model.bin": b"pickled", "notes.txt": b"mine"})
    load_adapter(ADAPTER)[0].load_reader()
    fetched = [call.path for call in hub.requests if "/resolve/" in call.path]
    assert any(WEIGHTS in target for target in fetched)
    assert not [target for target in fetched if re.search(r"\.bin|\.py|onnx|notes", target)]


def test_card_on_the_hub_says_how_to_load_it(hub: HubServer, pushed: Adapter) -> None:
    push(pushed, to="adapter")  # without an owner it goes to one's own
    card = ModelCard.load(ADAPTER)
    assert (card.data.library_name, card.data.base_model) == ("textmeta", ENCODER)
    assert f'from_pretrained("{ADAPTER}")' in card.text
    push(pushed, subfolder="second")
    written = hub.files(ADAPTER)["second/README.md"].decode()
    assert f'from_pretrained("{ADAPTER}", subfolder="second")' in written


def test_revision_subfolder_and_cache(hub: HubServer, pushed: Adapter, fitted: Fitted, tmp_path: Path) -> None:
    first = push(pushed)
    push(pushed, fitted, revision="fitted")
    push(pushed, fitted, subfolder="sub")
    assert load_adapter(ADAPTER)[1] is None
    assert load_adapter(ADAPTER, revision="fitted")[1] is not None
    assert found_at(ADAPTER, revision=first.oid).commit == first.oid
    loaded_logits(subfolder="sub", access=HubAccess(cache_dir=tmp_path / "cache"))
    assert (tmp_path / "cache" / "models--tester--adapter").is_dir()
    assert (tmp_path / "cache" / "models--lab--tiny").is_dir(), "the encoder goes there too"


def test_second_push_deletes_what_the_new_adapter_has_not(hub: HubServer, pushed: Adapter, fitted: Fitted) -> None:
    push(pushed, fitted)
    hub.commit(ADAPTER, {"notes.txt": b"mine"})
    assert "classifier.json" in hub.files(ADAPTER)
    push(pushed)
    assert not [name for name in hub.files(ADAPTER) if name.startswith("classifier")]
    assert hub.files(ADAPTER)["notes.txt"] == b"mine"
    assert load_adapter(ADAPTER)[1] is None


def test_folder_is_pushed_with_its_edited_card(hub: HubServer, pushed: Adapter, fitted: Fitted, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", pushed, fitted)
    card = (tmp_path / "adapter" / "README.md").read_text()
    (tmp_path / "adapter" / "README.md").write_text(card.replace("# Fitted", "# My own"))
    push_folder(tmp_path / "adapter", "tester/copy", token=TOKEN)
    files, copy = contents(tmp_path / "adapter"), hub.files("tester/copy")
    assert b"# My own" in copy.pop("README.md")
    assert {name: copy[name] for name in files if name != "README.md"} == {
        name: content for name, content in files.items() if name != "README.md"
    }


def test_offline_the_cache_serves(hub: HubServer, pushed: Adapter, fitted: Fitted) -> None:
    push(pushed, fitted)
    expected = loaded_logits()
    seen = len(hub.requests)
    assert torch.equal(loaded_logits(access=HubAccess(local_files_only=True)), expected)
    assert len(hub.requests) == seen, "nobody was asked"
    hub.faults.append(Fault("status", path=".", status=503, times=10**6))
    assert torch.equal(loaded_logits(), expected)


def test_silent_hub_is_not_asked_for_what_is_here_by_its_hash(hub: HubServer, pushed: Adapter, fitted: Fitted) -> None:
    commit = push(pushed, fitted).oid
    expected = loaded_logits(revision=commit)
    hub.requests.clear()
    hub.faults.append(Fault("silence", path=".", times=10**6))
    began = time.monotonic()
    assert torch.equal(loaded_logits(revision=commit), expected)
    assert time.monotonic() - began < 3
    assert not hub.requests
    hub.faults.clear()
    shutil.rmtree(snapshot(ENCODER))  # the adapter alone is here
    assert torch.equal(loaded_logits(revision=commit), expected)


def test_silent_hub_is_not_waited_for(hub: HubServer, pushed: Adapter, fitted: Fitted, monkeypatch: Patch) -> None:
    push(pushed, fitted)
    expected = loaded_logits()
    monkeypatch.setattr("textmeta.hub.DEADLINE", 0.2)
    hub.faults.append(Fault("silence", path=".", times=10**6))
    began = time.monotonic()
    assert torch.equal(loaded_logits(), expected), "the cache serves"
    for act in (lambda: load_adapter("tester/other"), lambda: push(pushed), lambda: check_reachable("lab/data")):
        with pytest.raises(HubUnreachableError, match=r"cannot be reached \(ReadTimeout"):
            act()
    assert time.monotonic() - began < 20


# Errors


def test_no_such_repository_and_a_gated_one(hub: HubServer) -> None:
    hub.add_repo("lab/gated", {"textmeta.json": b"{}"}, gated=True)
    gated = rf"'lab/gated' is gated: ask for access at {hub.url}/lab/gated; .*log in"
    for name, token, message in (
        ("tester/none", None, r"'tester/none' is no folder here.*no model 'tester/none'.*no token was given"),
        ("tester/none", TOKEN, r"no model 'tester/none'.*the token given has no right to it"),
        ("lab/gated", None, gated),
    ):
        with pytest.raises(HubError, match=message):
            load_adapter(name, access=HubAccess(token))


def test_private_repository_and_private_encoder(hub: HubServer, pushed: Adapter) -> None:
    assert "secret" not in repr(HubAccess("secret"))
    push(pushed, private=True)
    with pytest.raises(HubError, match=r"private and no token was given: log in with `hf auth login`"):
        load_adapter(ADAPTER)
    adapter, _ = load_adapter(ADAPTER, access=HubAccess(READ_TOKEN))
    hub.repos["model", ENCODER].private = True
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--lab--tiny")
    with pytest.raises(EncoderError, match=rf"no model '{ENCODER}' on the Hub"):
        adapter.load_reader()


def test_private_push_into_a_public_repository_is_refused(hub: HubServer, pushed: Adapter, fitted: Fitted) -> None:
    push(pushed, private=False)
    before = hub.files(ADAPTER)
    with pytest.raises(HubError, match=r"not pushed: 'tester/adapter' is there already, and is public"):
        push(pushed, fitted, private=True)
    assert hub.files(ADAPTER) == before


@pytest.mark.parametrize("revision", ["v9", "../x", "/etc", "a..b", "", "x" * 300, "a\nb"])
def test_revision_that_there_is_not_or_that_can_be_none(hub: HubServer, pushed: Adapter, revision: str) -> None:
    push(pushed)
    seen = len(hub.requests)
    expected = "has no revision 'v9'" if revision == "v9" else "is no revision"
    with pytest.raises(HubError, match=expected):
        load_adapter(ADAPTER, revision=revision)
    assert revision == "v9" or len(hub.requests) == seen, "nobody is asked"


def test_no_network_and_nothing_cached(hub: HubServer, monkeypatch: Patch) -> None:
    with pytest.raises(HubUnreachableError, match=r"cannot be reached \(only local files.*not in the cache"):
        load_adapter(ADAPTER, access=HubAccess(local_files_only=True))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(
        HubUnreachableError, match=r"cannot be reached \(ConnectError.*'tester/adapter'.*not in the cache"
    ):
        load_adapter(ADAPTER)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_config.json", "modules.json", "notes.txt"], f"is no textmeta adapter: it has no {MANIFEST}"),
        (["config_setfit.json", "model_head.pkl", "config.json"], "is a SetFit model and no textm.*give the examples"),
    ],
    ids=["other", "SetFit"],
)
def test_what_is_no_adapter_is_told(hub: HubServer, tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    hub.add_repo("lab/other", dict.fromkeys(names, b"{}"))
    for name in (tmp_path, "lab/other"):
        with pytest.raises(AdapterError, match=f"({tmp_path}|'lab/other' on the Hub) {message}"):
            load_adapter(name)


def test_encoder_that_is_a_folder_is_not_pushed_and_not_opened(
    hub: HubServer, tiny_model: str, adapter: Adapter, saved: Path, encoder_on_hub: str
) -> None:
    for attempt in (lambda: push(adapter), lambda: push_folder(saved, ADAPTER, token=TOKEN)):
        with pytest.raises(AdapterError, match=r"not pushed: the adapter's encoder is '/.*a folder of this machine"):
            attempt()
    assert ("model", ADAPTER) not in hub.repos
    # somebody else's adapter that names a folder of this machine
    hub.add_repo("lab/evil", contents(saved))
    with pytest.raises(AdapterError, match=r"no folder of this machine is opened .*: name the encoder"):
        load_adapter("lab/evil")
    loaded, _ = load_adapter("lab/evil", encoder=tiny_model)
    loaded.load_reader(model=tiny_model)
    # and with the encoder's name on the Hub it can be pushed
    for attempt in (
        lambda: push(adapter, base_model=ENCODER),
        lambda: push_folder(saved, ADAPTER, token=TOKEN, base_model=ENCODER),
    ):
        attempt()
        assert load_adapter(ADAPTER)[0].load_reader().encoder.settings.model == ENCODER
    with pytest.raises(AdapterError, match=r"base_model must be an id on the Hub .*given 'not valid id!'"):
        push(adapter, base_model="not valid id!")


def test_push_without_the_right_to_write(hub: HubServer, pushed: Adapter) -> None:
    with pytest.raises(HubError, match=r"status 403 for .*tester/adapter.*the token given has no right"):
        push(pushed, token=READ_TOKEN)
    with pytest.raises(HubError, match=r"status 40\d for .*no token was given.*hf auth login"):
        push(pushed, token=None)
    with pytest.raises(HubError, match="lab/mine"):
        push(pushed, to="lab/mine")


def test_push_in_between_is_noticed_and_nothing_changed(hub: HubServer, pushed: Adapter, fitted: Fitted) -> None:
    push(pushed)
    hub.faults.append(Fault("stale_parent", path="commit"))
    with pytest.raises(HubError, match=r"somebody else pushed to 'tester/adapter' .*; nothing was changed"):
        push(pushed, fitted)
    assert load_adapter(ADAPTER)[1] is None
    push(pushed, fitted)
    assert load_adapter(ADAPTER)[1] is not None


def test_card_that_the_hub_refuses_is_not_pushed(hub: HubServer, pushed: Adapter, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", pushed)
    card = tmp_path / "adapter" / "README.md"
    card.write_text(card.read_text().replace("library_name: textmeta", "license: my-own"))
    with pytest.raises(AdapterError, match=r"does not accept the metadata block of README\.md.*license"):
        push_folder(tmp_path / "adapter", ADAPTER, token=TOKEN)
    assert ("model", ADAPTER) not in hub.repos


# Faults


def test_503_twice_and_a_connection_cut_in_mid_download_are_got_over(
    hub: HubServer, pushed_reader: TokenStateReader, pushed: Adapter, fitted: Fitted
) -> None:
    push(pushed, fitted)
    hub.faults += [
        Fault("status", path="revision/main|tree", times=2),
        Fault("cut", path="resolve", method="GET", times=2, after=500),
    ]
    found = loaded_logits()
    assert not [fault for fault in hub.faults if fault.times], "both were played"
    assert torch.equal(found, logits(pushed_reader, pushed, fitted))


@pytest.mark.parametrize(("kind", "message"), [("cut", "tester/adapter"), ("truncate", "should be of size")])
def test_download_that_never_ends_leaves_nothing_used(hub: HubServer, pushed: Adapter, kind: Any, message: str) -> None:
    push(pushed)
    hub.faults.append(Fault(kind, path="resolve", method="GET", times=10**6, after=500))
    with pytest.raises(HubError, match=message):
        load_adapter(ADAPTER)
    hub.faults.clear()
    load_adapter(ADAPTER)


@pytest.mark.parametrize("name", [WEIGHTS, "textmeta.json", MANIFEST])
def test_file_damaged_in_cache_is_downloaded_again(pushed: Adapter, fitted: Fitted, name: str, caplog: Logged) -> None:
    push(pushed, fitted)
    expected = loaded_logits()
    blob = (snapshot() / name).resolve()
    os.truncate(blob, blob.stat().st_size // 2)
    with pytest.raises(AdapterError, match=re.escape(name)):
        load_adapter(ADAPTER, access=HubAccess(local_files_only=True))
    assert torch.equal(loaded_logits(), expected)
    assert "downloading it again" in caplog.text


def test_adapter_that_is_damaged_on_the_hub_itself_is_refused(hub: HubServer, pushed: Adapter) -> None:
    push(pushed)
    content = bytearray(hub.files(ADAPTER)[WEIGHTS])
    content[-1] ^= 1
    hub.commit(ADAPTER, {WEIGHTS: bytes(content)})
    with pytest.raises(AdapterError, match=rf"{WEIGHTS} is damaged"):
        load_adapter(ADAPTER)


def test_encoder_whose_weights_changed_is_found_or_refused(hub: HubServer, pushed: Adapter, tiny_model: str) -> None:
    push(pushed)
    weights = load((Path(tiny_model) / "model.safetensors").read_bytes())
    changed = {name: value + 1 for name, value in weights.items()}
    hub.commit(ENCODER, {"model.safetensors": save(changed, metadata={"format": "pt"})})
    adapter, _ = load_adapter(ADAPTER)
    adapter.load_reader()  # the adapter knows the commit that it was trained on
    with pytest.raises(AdapterError, match=rf"belongs to {ENCODER} with weights"):
        adapter.load_reader(model=ENCODER)


def test_encoder_whose_commit_went_is_found(hub: HubServer, pushed: Adapter, tiny_model: str, caplog: Logged) -> None:
    push(pushed)
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--lab--tiny")
    files = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
    hub.add_repo(ENCODER, {**files, "notes.txt": b"made anew"})
    load_adapter(ADAPTER)[0].load_reader()
    assert "looking for the encoder at revision main" in caplog.text


# Names


def test_a_folder_comes_before_the_package_and_the_package_before_the_hub(
    hub: HubServer, pushed: Adapter, tmp_path: Path, monkeypatch: Patch, caplog: Logged
) -> None:
    caplog.set_level(logging.DEBUG, logger="textmeta")
    name = "textmeta/minilm-test"
    save_adapter(tmp_path / "made", pushed)
    hub.add_repo(name, contents(tmp_path / "made"))
    monkeypatch.chdir(tmp_path)
    assert found_at(name).kind == "hub"
    assert f"{name} is on the Hub, at commit" in caplog.text
    monkeypatch.setattr(locating, "SHIPPED", tmp_path / "package")
    shutil.copytree(tmp_path / "made", tmp_path / "package" / "minilm-test")
    assert found_at(name).kind == "shipped"
    assert f"{name} comes with textmeta" in caplog.text
    assert found_at(name, revision="main").kind == "hub", "a revision is one on the Hub"
    shutil.copytree(tmp_path / "made", tmp_path / name)
    assert found_at(name).kind == "folder"
    assert f"{tmp_path / name} is a folder" in caplog.text
    with pytest.raises(AdapterError, match=r"nor is it the id .*which alone has revisions"):
        load_adapter(str(tmp_path / name), revision="main")


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "../none", "a/b/c", "runs/none/", "a//b", "-x", ""])
def test_name_that_is_no_folder_and_no_id_is_said_to_be_neither(hub: HubServer, name: str) -> None:
    with pytest.raises(AdapterError, match=r"no such adapter folder.*nor is it the id of a repository"):
        load_adapter(name)
    assert not hub.requests


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b", "./sub", "sub/", "", "a[1]", "a//b", "*"])
def test_subfolder_that_is_no_plain_path_below_is_refused(hub: HubServer, pushed: Adapter, subfolder: str) -> None:
    for act in (lambda: load_adapter(ADAPTER, subfolder=subfolder), lambda: push(pushed, subfolder=subfolder)):
        with pytest.raises(AdapterError, match="subfolder must be a path below"):
            act()
    assert ("model", ADAPTER) not in hub.repos


def test_folder_that_a_killed_save_set_aside_is_found_by_its_name(
    hub: HubServer, adapter: Adapter, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter("runs/mine", adapter)
    (tmp_path / "runs" / "mine").rename(tmp_path / "runs" / ".mine.textmeta-old")
    assert found_at("runs/mine").kind == "folder"
    assert not hub.requests, "the Hub does not learn of it"
