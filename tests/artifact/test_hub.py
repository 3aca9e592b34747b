"""Adapters through a local Hub, with the real client: push, pull, errors, faults, and what a name means."""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load, save

from tests.artifact.test_store import rewrite_json
from tests.hub.fixture import environment
from tests.hub.server import READ_TOKEN, TOKEN, Fault, HubServer
from textmeta import FewShotClassifier
from textmeta.artifact import locate as locating
from textmeta.artifact.folder import MANIFEST
from textmeta.artifact.locate import load_from
from textmeta.artifact.publish import Destination, push_folder
from textmeta.errors import AdapterError, EncoderError, HubError, HubUnreachableError
from textmeta.hub import HubAccess
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings

ENCODER, ADAPTER = "lab/tiny", "tester/adapter"
TEXTS, LABELS = ["bal bel", "bil bol", "dal del", "dil dol"], ["b", "b", "d", "d"]
QUERIES = ["bal bol", "del dol", "bel dal fim"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textmeta.hub.WAITS", (0, 0, 0))


@pytest.fixture
def encoder_on_hub(hub: HubServer, tiny_model: str) -> str:
    """The commit of the tiny encoder's repository, which also holds what must never be downloaded."""
    files = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
    return hub.add_repo(
        ENCODER, {**files, "pytorch_model.bin": b"pickled", "modeling.py": b"code", "onnx/a.json": b"{}"}
    )


@pytest.fixture
def classifier(encoder_on_hub: str) -> FewShotClassifier:
    """An adapter on the encoder of the Hub, none of its parameters at its start, not fitted."""
    encoder = Encoder(EncoderSettings(ENCODER, max_length=32), LoraSettings(rank=4))
    generator = torch.Generator().manual_seed(0)
    inner = InnerLoopSettings(steps=2)
    start = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    parameters = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in start.items()}
    return FewShotClassifier(encoder, parameters, inner, {"episodes": 1})


def snapshot(name: str = ADAPTER) -> Path:
    return next((Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").iterdir())


def test_round_trip_through_the_hub_is_exact_to_the_bit(
    hub: HubServer, classifier: FewShotClassifier, encoder_on_hub: str
) -> None:
    before = classifier.fit(TEXTS, LABELS).predict_proba(QUERIES)
    pushed = classifier.push_to_hub(ADAPTER, token=TOKEN, private=False, commit_message="the first")
    assert pushed.commit_message == "the first"
    loaded = FewShotClassifier.from_pretrained(ADAPTER)
    assert np.array_equal(loaded.predict_proba(QUERIES), before)
    adapter, where = load_from(ADAPTER)
    assert (where.kind, where.commit, adapter.commit) == ("hub", pushed.oid, encoder_on_hub)
    again = FewShotClassifier.from_pretrained(ADAPTER).fit(TEXTS, LABELS)
    assert np.array_equal(again.predict_proba(QUERIES), before)


def test_nothing_but_safetensors_and_text_is_downloaded(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    hub.commit(ADAPTER, {"pytorch_model.bin": b"pickled", "notes.txt": b"mine"})
    FewShotClassifier.from_pretrained(ADAPTER)
    fetched = [call.path for call in hub.requests if "/resolve/" in call.path]
    assert any(WEIGHTS in target for target in fetched)
    assert not [target for target in fetched if re.search(r"\.bin|\.py|onnx|notes", target)]


def test_card_on_the_hub_says_how_to_load_it(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    card = ModelCard.load(ADAPTER)
    assert card.data.library_name == "textmeta"
    assert card.data.base_model == ENCODER
    assert f'from_pretrained("{ADAPTER}")' in card.text
    classifier.push_to_hub(ADAPTER, token=TOKEN, subfolder="second")
    written = hub.files(ADAPTER)["second/README.md"].decode()
    assert f'from_pretrained("{ADAPTER}", subfolder="second")' in written


def test_revision_subfolder_and_cache(hub: HubServer, classifier: FewShotClassifier, tmp_path: Path) -> None:
    first = classifier.push_to_hub(ADAPTER, token=TOKEN)
    classifier.fit(TEXTS, LABELS).push_to_hub(ADAPTER, token=TOKEN, revision="fitted")
    classifier.push_to_hub(ADAPTER, token=TOKEN, subfolder="sub")
    assert load_from(ADAPTER)[0].fitted is None
    assert load_from(ADAPTER, revision="fitted")[0].fitted is not None
    assert load_from(ADAPTER, revision=first.oid)[1].commit == first.oid
    loaded = FewShotClassifier.from_pretrained(ADAPTER, subfolder="sub", cache_dir=tmp_path / "cache")
    assert np.array_equal(loaded.predict_proba(QUERIES), classifier.predict_proba(QUERIES))
    assert (tmp_path / "cache" / "models--tester--adapter").is_dir()
    assert (tmp_path / "cache" / "models--lab--tiny").is_dir(), "the encoder goes there too"


def test_adapters_in_subfolders_alone_are_named(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN, subfolder="sub")
    with pytest.raises(AdapterError, match=r"adapters in the subfolders sub: name one"):
        load_from(ADAPTER)


def test_second_push_deletes_what_the_new_adapter_has_not(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.fit(TEXTS, LABELS).push_to_hub(ADAPTER, token=TOKEN)
    hub.commit(ADAPTER, {"notes.txt": b"mine"})
    assert "classifier.json" in hub.files(ADAPTER)
    classifier._learned = None
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    assert not [name for name in hub.files(ADAPTER) if name.startswith("classifier")]
    assert hub.files(ADAPTER)["notes.txt"] == b"mine"
    assert load_from(ADAPTER)[0].fitted is None


def test_offline_the_cache_serves(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.fit(TEXTS, LABELS).push_to_hub(ADAPTER, token=TOKEN)
    expected = FewShotClassifier.from_pretrained(ADAPTER).predict_proba(QUERIES)
    seen = len(hub.requests)
    offline = FewShotClassifier.from_pretrained(ADAPTER, local_files_only=True)
    assert np.array_equal(offline.predict_proba(QUERIES), expected)
    assert len(hub.requests) == seen, "nobody was asked"
    hub.faults.append(Fault("status", path=".", status=503, times=10**6))
    unreachable = FewShotClassifier.from_pretrained(ADAPTER)
    assert np.array_equal(unreachable.predict_proba(QUERIES), expected)


def test_snapshot_folder_of_the_cache_can_be_named(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    load_from(ADAPTER)
    assert (snapshot() / WEIGHTS).is_symlink()
    assert load_from(snapshot())[1].kind == "folder"


# Errors


def test_no_such_repository(hub: HubServer) -> None:
    with pytest.raises(HubError, match=r"'tester/none' is no folder here.*no model 'tester/none'.*no token was given"):
        FewShotClassifier.from_pretrained("tester/none")
    with pytest.raises(HubError, match=r"no model 'tester/none'.*the token given does not open it"):
        FewShotClassifier.from_pretrained("tester/none", token=TOKEN)


def test_private_repository(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN, private=True)
    with pytest.raises(HubError, match=r"private and no token was given: log in with `hf auth login`"):
        load_from(ADAPTER)
    FewShotClassifier.from_pretrained(ADAPTER, token=READ_TOKEN)


def test_private_push_into_a_public_repository_is_refused(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN, private=False)
    before = hub.files(ADAPTER)
    with pytest.raises(HubError, match=r"not pushed: 'tester/adapter' is there already, and is public"):
        classifier.fit(TEXTS, LABELS).push_to_hub(ADAPTER, token=TOKEN, private=True, include_support=True)
    assert hub.files(ADAPTER) == before


def test_gated_repository(hub: HubServer) -> None:
    hub.add_repo("lab/gated", {"textmeta.json": b"{}"}, gated=True)
    with pytest.raises(HubError, match=rf"'lab/gated' is gated: ask for access at {hub.url}/lab/gated, then log in"):
        load_from("lab/gated")


def test_no_such_revision(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    with pytest.raises(HubError, match=r"'tester/adapter' has no revision 'v9'"):
        load_from(ADAPTER, revision="v9")


def test_no_network_and_nothing_cached(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubUnreachableError, match=r"cannot be reached \(only local files.*not in the cache"):
        FewShotClassifier.from_pretrained(ADAPTER, local_files_only=True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(
        HubUnreachableError, match=r"cannot be reached \(ConnectError.*'tester/adapter'.*not in the cache"
    ):
        FewShotClassifier.from_pretrained(ADAPTER)


@pytest.mark.parametrize(
    ("files", "guess"),
    [
        ({"adapter_config.json": b"{}", WEIGHTS: b""}, "seems to be a plain PEFT adapter"),
        ({"config_setfit.json": b"{}", "modules.json": b"[]"}, "seems to be a SetFit model"),
        ({"modules.json": b"[]", "config.json": b"{}"}, "seems to be a sentence-transformers model"),
        ({"config.json": b"{}"}, "seems to be a transformers model"),
        ({"notes.txt": b""}, r"holds \.gitattributes, notes\.txt"),
    ],
    ids=["peft", "setfit", "sentence-transformers", "transformers", "other"],
)
def test_repository_that_is_no_adapter(hub: HubServer, files: dict[str, bytes], guess: str) -> None:
    hub.add_repo("lab/other", files)
    with pytest.raises(
        AdapterError, match=f"'lab/other' on the Hub is no textmeta adapter: it has no {MANIFEST}; it {guess}"
    ):
        load_from("lab/other")


def test_newer_format(hub: HubServer, classifier: FewShotClassifier, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter", "textmeta.json", lambda meta: meta.update(format_version=99))
    hub.add_repo(ADAPTER, {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()})
    with pytest.raises(
        AdapterError, match=r"format version 99, .* made by another version of textmeta: train it again"
    ):
        load_from(ADAPTER)


def test_encoder_that_is_a_folder_is_not_pushed_and_not_opened(
    hub: HubServer, tiny_model: str, encoder: Encoder, tmp_path: Path, encoder_on_hub: str
) -> None:
    inner = InnerLoopSettings(steps=1)
    classifier = FewShotClassifier(encoder, start_parameters(encoder.factor_shapes, inner, encoder.hidden_size), inner)
    with pytest.raises(AdapterError, match=r"not pushed: the adapter's encoder is '/.*a folder of this machine"):
        classifier.push_to_hub(ADAPTER, token=TOKEN)
    assert ("model", ADAPTER) not in hub.repos
    classifier.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="not pushed"):
        push_folder(tmp_path / "adapter", Destination(ADAPTER, token=TOKEN))
    # somebody else's adapter that names a folder of this machine
    hub.add_repo("lab/evil", {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()})
    with pytest.raises(AdapterError, match=r"no folder of this machine is opened .*: name the encoder"):
        FewShotClassifier.from_pretrained("lab/evil")
    FewShotClassifier.from_pretrained("lab/evil", encoder=tiny_model)
    # and with the encoder's name on the Hub it can be pushed
    classifier.push_to_hub(ADAPTER, token=TOKEN, base_model=ENCODER)
    assert FewShotClassifier.from_pretrained(ADAPTER)._encoder.settings.model == ENCODER


def test_push_without_the_right_to_write(hub: HubServer, classifier: FewShotClassifier) -> None:
    with pytest.raises(HubError, match=r"refuses this to the token given.*tester/adapter.*403"):
        classifier.push_to_hub(ADAPTER, token=READ_TOKEN)
    with pytest.raises(HubError, match=r"refuses this to users without a token.*hf auth login"):
        classifier.push_to_hub(ADAPTER)
    with pytest.raises(HubError, match="lab/mine"):
        classifier.push_to_hub("lab/mine", token=TOKEN)


def test_push_in_between_is_noticed_and_nothing_changed(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    hub.faults.append(Fault("stale_parent", path="commit"))
    with pytest.raises(HubError, match=r"somebody else pushed to 'tester/adapter' .*; nothing was changed"):
        classifier.fit(TEXTS, LABELS).push_to_hub(ADAPTER, token=TOKEN)
    assert load_from(ADAPTER)[0].fitted is None
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    assert load_from(ADAPTER)[0].fitted is not None


def test_damaged_folder_is_not_pushed(hub: HubServer, classifier: FewShotClassifier, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path / "adapter")
    os.truncate(tmp_path / "adapter" / WEIGHTS, 100)
    with pytest.raises(AdapterError, match="damaged"):
        push_folder(tmp_path / "adapter", Destination(ADAPTER, token=TOKEN))
    assert ("model", ADAPTER) not in hub.repos


def test_card_that_the_hub_refuses_is_not_pushed(hub: HubServer, classifier: FewShotClassifier, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path / "adapter")
    card = tmp_path / "adapter" / "README.md"
    card.write_text(card.read_text().replace("library_name: textmeta", "license: my-own"))
    with pytest.raises(AdapterError, match=r"does not accept the metadata block of README\.md.*license"):
        push_folder(tmp_path / "adapter", Destination(ADAPTER, token=TOKEN))
    assert ("model", ADAPTER) not in hub.repos


# Faults


def test_503_twice_and_a_connection_cut_in_mid_download_are_got_over(
    hub: HubServer, classifier: FewShotClassifier
) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    expected = classifier.fit(TEXTS, LABELS).predict_proba(QUERIES)
    hub.faults += [
        Fault("status", path="revision/main|tree", times=2),
        Fault("cut", path="storage|resolve", method="GET", times=2, after=500),
    ]
    loaded = FewShotClassifier.from_pretrained(ADAPTER)
    assert not [fault for fault in hub.faults if fault.times], "both were played"
    assert np.array_equal(loaded.fit(TEXTS, LABELS).predict_proba(QUERIES), expected)


def test_connection_that_is_always_cut_leaves_nothing_that_is_used(
    hub: HubServer, classifier: FewShotClassifier
) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    hub.faults.append(Fault("cut", path=r"storage", method="GET", times=10**6, after=500))
    with pytest.raises(HubError):
        load_from(ADAPTER)
    hub.faults.clear()
    load_from(ADAPTER)


def test_file_cut_short_by_the_server_is_refused(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    hub.faults.append(Fault("truncate", path=r"storage", method="GET", times=10**6, after=500))
    with pytest.raises(HubError, match=r"could not be transferred.*should be of size"):
        load_from(ADAPTER)
    hub.faults.clear()
    load_from(ADAPTER)


@pytest.mark.parametrize("name", [WEIGHTS, "textmeta.json", MANIFEST])
def test_file_damaged_in_the_cache_is_downloaded_again(
    hub: HubServer, classifier: FewShotClassifier, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    classifier.fit(TEXTS, LABELS).push_to_hub(ADAPTER, token=TOKEN)
    expected = FewShotClassifier.from_pretrained(ADAPTER).predict_proba(QUERIES)
    blob = (snapshot() / name).resolve()
    os.truncate(blob, blob.stat().st_size // 2)
    with pytest.raises(AdapterError, match=re.escape(name)):
        load_from(ADAPTER, access=HubAccess(local_files_only=True))
    assert np.array_equal(FewShotClassifier.from_pretrained(ADAPTER).predict_proba(QUERIES), expected)
    assert "downloading it again" in caplog.text


def test_adapter_that_is_damaged_on_the_hub_itself_is_refused(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    content = bytearray(hub.files(ADAPTER)[WEIGHTS])
    content[-1] ^= 1
    hub.commit(ADAPTER, {WEIGHTS: bytes(content)})
    with pytest.raises(AdapterError, match=rf"{WEIGHTS} is damaged"):
        load_from(ADAPTER)


def test_encoder_whose_weights_changed_is_found_by_its_commit_or_refused(
    hub: HubServer, classifier: FewShotClassifier, tiny_model: str
) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    weights = load((Path(tiny_model) / "model.safetensors").read_bytes())
    changed = {name: value + 1 for name, value in weights.items()}
    hub.commit(ENCODER, {"model.safetensors": save(changed, metadata={"format": "pt"})})
    FewShotClassifier.from_pretrained(ADAPTER)  # the adapter knows the commit that it was trained on
    with pytest.raises(AdapterError, match=rf"belongs to {ENCODER} with weights"):
        FewShotClassifier.from_pretrained(ADAPTER, encoder=ENCODER)


def test_encoder_with_pickled_weights_alone_is_refused(hub: HubServer, tiny_model: str) -> None:
    files = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir() if path.suffix != ".safetensors"}
    hub.add_repo("lab/pickled", {**files, "pytorch_model.bin": b"pickled"})
    with pytest.raises(EncoderError, match=r"'lab/pickled'.*safetensors"):
        Encoder(EncoderSettings("lab/pickled"))
    assert not [call for call in hub.requests if "pytorch_model.bin" in call.path and "resolve" in call.path]


# Names


def test_a_folder_comes_before_the_package_and_the_package_before_the_hub(
    hub: HubServer,
    classifier: FewShotClassifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="textmeta")
    name = "textmeta/minilm-test"
    hub.add_repo(name, files_of(classifier, tmp_path / "made"))
    monkeypatch.chdir(tmp_path)
    assert load_from(name)[1].kind == "hub"
    assert f"{name} is on the Hub, at commit" in caplog.text
    monkeypatch.setattr(locating, "SHIPPED", tmp_path / "package")
    shutil.copytree(tmp_path / "made", tmp_path / "package" / "minilm-test")
    assert load_from(name)[1].kind == "shipped"
    assert f"{name} is shipped with textmeta" in caplog.text
    assert load_from(name, revision="main")[1].kind == "hub", "a revision is one on the Hub"
    shutil.copytree(tmp_path / "made", tmp_path / name)
    assert load_from(name)[1].kind == "folder"
    assert f"{tmp_path / name} is a folder" in caplog.text


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "../none", "a/b/c", "runs/none/", "a//b", "-x", ""])
def test_name_that_is_no_folder_and_no_id_is_said_to_be_neither(hub: HubServer, name: str) -> None:
    with pytest.raises(AdapterError, match=r"no such adapter folder.*nor is it the id of a repository"):
        load_from(name)
    assert not hub.requests


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b", "./sub", "sub/", "/", "", "a[1]", "a//b", "*"])
def test_subfolder_that_is_no_plain_path_below_is_refused(
    hub: HubServer, classifier: FewShotClassifier, subfolder: str
) -> None:
    with pytest.raises(AdapterError, match="subfolder must be a path below"):
        load_from(ADAPTER, subfolder=subfolder)
    with pytest.raises(AdapterError, match="subfolder must be a path below"):
        classifier.push_to_hub(ADAPTER, token=TOKEN, subfolder=subfolder)
    assert ("model", ADAPTER) not in hub.repos


def test_folder_that_a_killed_save_set_aside_is_found_by_its_name(
    hub: HubServer, classifier: FewShotClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier.save_pretrained("runs/mine")
    (tmp_path / "runs" / "mine").rename(tmp_path / "runs" / ".mine.textmeta-old")
    seen = len(hub.requests)
    assert load_from("runs/mine")[1].kind == "folder"
    assert len(hub.requests) == seen, "the Hub does not learn of it"


def test_revision_means_the_hub_even_where_a_folder_has_the_name(
    hub: HubServer, classifier: FewShotClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pushed = classifier.push_to_hub(ADAPTER, token=TOKEN)
    classifier.fit(TEXTS, LABELS).save_pretrained(ADAPTER)
    assert load_from(ADAPTER)[1].kind == "folder"
    adapter, where = load_from(ADAPTER, revision=pushed.oid)
    assert (where.kind, adapter.fitted) == ("hub", None)
    with pytest.raises(AdapterError, match=r"nor is it the id .*which alone has revisions"):
        load_from(str(tmp_path / ADAPTER), revision="main")


@pytest.mark.parametrize("revision", ["../x", "/etc", "a..b", "", "x" * 300, "a\nb"])
def test_revision_that_can_be_none_is_refused_before_anybody_is_asked(hub: HubServer, revision: str) -> None:
    with pytest.raises(HubError, match="is no revision"):
        load_from(ADAPTER, revision=revision)
    assert not hub.requests


def test_push_without_an_owner_goes_to_ones_own_and_the_card_says_so(
    hub: HubServer, classifier: FewShotClassifier
) -> None:
    classifier.push_to_hub("parcels", token=TOKEN)
    assert 'from_pretrained("tester/parcels")' in hub.files("tester/parcels")["README.md"].decode()


def test_base_model_that_is_no_id_is_named(hub: HubServer, classifier: FewShotClassifier) -> None:
    with pytest.raises(AdapterError, match=r"base_model must be an id on the Hub .*given 'not valid id!'"):
        classifier.push_to_hub(ADAPTER, token=TOKEN, base_model="not valid id!")


def test_private_encoder_is_loaded_with_the_token_given(hub: HubServer, classifier: FewShotClassifier) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    hub.repos["model", ENCODER].private = True
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--lab--tiny")
    with pytest.raises(EncoderError, match=rf"no model '{ENCODER}' on the Hub"):
        FewShotClassifier.from_pretrained(ADAPTER)


def test_loaded_from_the_hub_and_pushed_again_with_everything_that_it_had(
    hub: HubServer, classifier: FewShotClassifier
) -> None:
    labels = ["card", "card", float("inf"), float("inf")]
    classifier.fit(TEXTS, labels).push_to_hub(ADAPTER, token=TOKEN, include_support=True)
    before = hub.files(ADAPTER)
    loaded = FewShotClassifier.from_pretrained(ADAPTER)
    assert loaded.support_ == list(zip(TEXTS, labels, strict=True))
    loaded.push_to_hub("tester/again", token=TOKEN, include_support=True)
    again = hub.files("tester/again")
    again["README.md"] = again["README.md"].replace(b"tester/again", b"tester/adapter")
    assert again == before


def test_encoder_whose_commit_is_gone_is_looked_for_with_a_warning(
    hub: HubServer, classifier: FewShotClassifier, tiny_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    classifier.push_to_hub(ADAPTER, token=TOKEN)
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--lab--tiny")
    files = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
    hub.add_repo(ENCODER, {**files, "notes.txt": b"made anew"})
    FewShotClassifier.from_pretrained(ADAPTER)
    assert "looking for the encoder at revision main" in caplog.text


def test_tokens_are_not_shown() -> None:
    assert "secret" not in repr(HubAccess("secret")) + repr(Destination(ADAPTER, token="secret"))


def test_new_processes_push_and_pull_unmodified(hub: HubServer, classifier: FewShotClassifier, tmp_path: Path) -> None:
    """Environment variables alone point the processes at the Hub, as users' are pointed at the real one."""
    expected = classifier.fit(TEXTS, LABELS).predict_proba(QUERIES)
    classifier.save_pretrained(tmp_path / "adapter")
    run = command_line(hub, tmp_path)
    pushed = run(
        "-c", "from textmeta.cli import main; main()", "push", "adapter", ADAPTER, "--message", "from a process"
    )
    assert f"{hub.url}/{ADAPTER}/commit/" in pushed
    script = (
        "import sys, numpy as np; from textmeta import FewShotClassifier\n"
        f"np.save('found.npy', FewShotClassifier.from_pretrained('{ADAPTER}').predict_proba({QUERIES!r}))"
    )
    run("-c", script)
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected)
    assert any("info/lfs" in call.path for call in hub.requests)


def command_line(hub: HubServer, folder: Path) -> Callable[..., str]:
    variables = environment(hub, folder / "home", TOKEN)
    variables = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def files_of(classifier: FewShotClassifier, folder: Path) -> dict[str, bytes]:
    classifier.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
