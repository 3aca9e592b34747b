"""Loading an encoder: the copy that the demo extra carries, and folders that are not what they should be."""

import hashlib
import json
import logging
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import textmeta.encoder.pretrained as pretrained
from tests.conftest import tiny_tokenizer
from tests.given import Logged, Patch
from tests.hub.server import Fault, HubServer
from textmeta.errors import EncoderError


@pytest.fixture
def carried(tiny_model: str, tmp_path: Path, monkeypatch: Patch) -> Path:
    """A package that carries the tiny model, in place of the demo extra's, and an empty Hub cache."""
    folder = tmp_path / "site" / "carrying_package" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    AutoModel.from_pretrained(tiny_model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(pretrained, "CARRIED_PACKAGE", "carrying_package")
    pretrained._say_once.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    weights = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(pretrained, "CARRIED_SHA256", hashlib.sha256(weights).hexdigest())
    yield folder
    sys.modules.pop("carrying_package", None)


def test_the_carried_copy_is_used_where_the_hub_is_out_of_reach(carried: Path, caplog: Logged) -> None:
    with caplog.at_level(logging.INFO):
        model, _ = (pretrained.load_pretrained(pretrained.DEFAULT_ENCODER)[0] for _ in range(2))
    assert caplog.text.count("using the copy carried by the package carrying_package") == 1
    assert model.config.hidden_size == 32
    assert model.dtype == torch.float32


def test_a_hub_that_never_answers_is_not_asked_where_the_copy_is_carried(hub: HubServer, carried: Path) -> None:
    hub.faults.append(Fault("silence", path=".", times=10**6))
    began = time.monotonic()
    assert pretrained.load_pretrained(pretrained.DEFAULT_ENCODER)[0].config.hidden_size == 32
    assert time.monotonic() - began < 3
    assert not hub.requests


def test_the_default_encoder_is_taken_from_the_cache_first(hub: HubServer, carried: Path, tiny_model: str) -> None:
    files = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
    commit = hub.add_repo(pretrained.DEFAULT_ENCODER, files)
    assert pretrained.load_pretrained(pretrained.DEFAULT_ENCODER, "main").commit == commit
    hub.requests.clear()
    assert pretrained.load_pretrained(pretrained.DEFAULT_ENCODER).commit == commit
    assert not hub.requests


def test_a_carried_copy_that_is_not_the_published_file_is_refused(carried: Path) -> None:
    weights = carried / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(EncoderError, match=r"model\.safetensors is not the published file"):
        pretrained.load_pretrained(pretrained.DEFAULT_ENCODER)


def test_what_is_not_carried_is_an_error(carried: Path, monkeypatch: Patch) -> None:
    """A revision that was asked for, another encoder, and, without the extra, all: what to install is said."""
    for given, message in (
        ((pretrained.DEFAULT_ENCODER, "abc"), "revision abc"),
        (("some/other",), r"'some/other'.*the Hub .* cannot be reached"),
    ):
        with pytest.raises(EncoderError, match=message):
            pretrained.load_pretrained(*given)
    monkeypatch.setattr(pretrained, "CARRIED_PACKAGE", "no_such_package")
    with pytest.raises(EncoderError, match=r"pip install 'textmeta\[demo\]'"):
        pretrained.load_pretrained(pretrained.DEFAULT_ENCODER)


def test_the_digest_sees_every_weight_and_not_the_storage(tiny_model: str) -> None:
    model = pretrained.load_pretrained(tiny_model)[0]
    before = pretrained.tensors_digest(model.state_dict())
    assert pretrained.tensors_digest(model.double().state_dict()) == before
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 5] += 1e-6
    assert pretrained.tensors_digest(model.state_dict()) != before


@pytest.fixture
def folder(tiny_model: str, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def changed(file: str, **values: object) -> Callable[[Path], object]:
    """Write values into a JSON file of a folder, into an empty one where there is none."""

    def damage(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **values}))

    return damage


class Canary:
    """Written by pickle so that reading it runs code."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, ("raise SystemExit('a pickle was read')",)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))


def sharded(file: str) -> Callable[[Path], object]:
    """Let the index name a file as that of every weight."""

    def damage(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
        (folder / "weights.bin").write_bytes(pickle.dumps(Canary()))
        changed("model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(names, file))(folder)

    return damage


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def lacking(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


CONFIG, TOKENIZER, SPECIAL = "config.json", "tokenizer_config.json", "special_tokens_map.json"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (pickled, r"pickled weights \(pytorch_model\.bin\) are never loaded"),
    "sharded pickle": (sharded("weights.bin"), r"index\.json: expected safetensors files of its folder, found 'w"),
    "weights above": (sharded("../model.safetensors"), r"index\.json: expected .*found '\.\./model"),
    "truncated": (truncated, "cannot load the encoder"),
    "missing weight": (lacking, r"lacks weights, which would be random: encoder\.layer\.1\.output\.dense\.weight"),
    "adapter": (changed("adapter_config.json"), "is an adapter, not an encoder"),
    "quantised": (changed(CONFIG, quantization_config={"quant_method": "x"}), f"{CONFIG}: 'quantization_config' is"),
    "kernels": (changed(CONFIG, attn_implementation="lab/x"), f"{CONFIG}: 'attn_implementation' is 'lab/x'"),
    "kernels of a part": (changed(CONFIG, part={"_attn_implementation": "lab/x"}), "'_attn_implementation' is 'lab/x'"),
    "tokenizer's arguments": (changed(TOKENIZER, init_inputs=["x"]), f"{TOKENIZER}: 'init_inputs' is"),
    "gguf": (changed(TOKENIZER, gguf_file="../x.gguf"), f"{TOKENIZER}: 'gguf_file' is"),
    "vocabulary elsewhere": (changed(TOKENIZER, vocab="../x"), f"{TOKENIZER}: 'vocab' names a file: '../x'"),
    "tokenizer elsewhere": (changed(TOKENIZER, fast_tokenizer_files=["../x"]), "'fast_tokenizer_files' is"),
    "special tokens elsewhere": (changed(SPECIAL, entity_vocab_file="../x"), f"{SPECIAL}: 'entity_vocab_file' names"),
    "10^9 layers": (
        changed(CONFIG, num_hidden_layers=10**9),
        "'num_hidden_layers' is 10+, expected at most 1000",
    ),
    "no object": (lambda folder: (folder / CONFIG).write_text("[]"), f"{CONFIG}: expected a JSON object, found list"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), f"{CONFIG} is no JSON"),
    "no file": (lambda folder: (folder / SPECIAL).mkdir(), f"{SPECIAL} is no plain file"),
}


@pytest.mark.parametrize(("damage", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_no_encoder_is_refused(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    pretrained.load_pretrained(str(folder))
    damage(folder)
    with pytest.raises(EncoderError, match=message):
        pretrained.load_pretrained(str(folder))


@pytest.mark.parametrize(
    ("pooling", "told"),
    [
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["cls", "mean"]}, "cls, mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "max, mean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_cls_token": False}, ""),
        ({"pooling_mode": "mean"}, ""),
        ({}, ""),
    ],
)
def test_a_pooling_not_followed_is_told(pooling: dict[str, object], told: str, tmp_path: Path, caplog: Logged) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for _ in range(2):
        assert pretrained.sentence_settings(tmp_path) == ("", False)
    expected = [f"{tmp_path} pools its tokens by {told}, which textmeta does not: their mean is taken"]
    assert caplog.messages == expected * bool(told), "once"
