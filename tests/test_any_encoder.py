"""Any encoder, with or without the adapter; and any device."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import textmeta
from tests.conftest import save_tiny_model
from tests.encoder.given import LANGUAGES, SIZES, TARGETS, rows_of, save_family, save_multilingual, states_of
from tests.given import LABELS, NAMES, SUPPORT, TEXTS, Logged, Patch, Shown
from tests.hub.server import HubServer
from textmeta import Adapter, FewShotClassifier
from textmeta.cli import main
from textmeta.encoder.encoder import device_of
from textmeta.errors import AdapterError, EncoderError, SettingsError
from textmeta.meta import general, trainer
from textmeta.sharing import locate
from textmeta.sharing.store import save_adapter

POOLING, PROMPTS = "1_Pooling/config.json", "config_sentence_transformers.json"


@pytest.fixture
def default(adapter: Adapter, tmp_path: Path, monkeypatch: Patch) -> Adapter:
    """The adapter that comes with textmeta, here one of the tiny encoder."""
    save_adapter(tmp_path / "shipped" / "minilm-general", adapter)
    monkeypatch.setattr(locate, "SHIPPED", tmp_path / "shipped")
    general._say_once.cache_clear()
    return adapter


def test_its_own_encoder_is_known_anywhere(default: Adapter, tiny_model: str, tmp_path: Path, caplog: Logged) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy")
    expected = FewShotClassifier(default).fit(SUPPORT, LABELS).predict_proba(TEXTS)
    found = FewShotClassifier(encoder=str(tmp_path / "copy")).fit(SUPPORT, LABELS)
    np.testing.assert_array_equal(found.predict_proba(TEXTS), expected)
    assert "without an adapter" not in caplog.text
    for encoder in (None, str(tmp_path / "copy")):
        untrained = FewShotClassifier(adapter=None, encoder=encoder).fit(SUPPORT, LABELS)
        assert not np.allclose(untrained.predict_proba(TEXTS), expected, atol=1e-3)
        assert untrained._adapter.weights_sha256 == default.weights_sha256


@pytest.mark.parametrize(
    "family", ["roberta", "electra-small", "deberta-v3", "modernbert", "eurobert", "megatron-bert"]
)
def test_any_encoder_works_without_an_adapter(family: str, default: Adapter, tmp_path: Path, caplog: Logged) -> None:
    folder = save_family(tmp_path / family, family)
    first, second = (FewShotClassifier(encoder=folder).fit(SUPPORT, LABELS) for _ in range(2))
    assert caplog.text.count(f"{folder} is used without an adapter") == 1
    assert first.score(SUPPORT, LABELS) > 0.8
    own = first._adapter.initialisation
    assert first._adapter.learner.layers == (2, 3, 4)
    assert first._adapter.encoder.max_length == 32, "the adapter's"
    assert not any(value.any() for name, value in own.lora.items() if ".lora_B." in name)
    assert not torch.cat([own.queries, own.centre, own.name_centre]).any()
    names = FewShotClassifier(encoder=folder).fit(label_names=NAMES)
    for one in (first, names):
        expected = one.predict_proba(TEXTS)
        assert np.isfinite(expected).all()
        one.save_pretrained(tmp_path / "saved")
        np.testing.assert_array_equal(
            FewShotClassifier.from_pretrained(tmp_path / "saved").predict_proba(TEXTS), expected
        )
    with pytest.raises(AdapterError, match="has no rule"):
        second.scope_score(TEXTS)


def test_a_pickle_is_of_the_encoder_that_it_was_fitted_on(default: Adapter, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "other", "bert")
    fitted = FewShotClassifier(encoder=folder).fit(SUPPORT, LABELS)
    expected, pickled = fitted.predict_proba(TEXTS), pickle.dumps(fitted)
    np.testing.assert_array_equal(pickle.loads(pickled).predict_proba(TEXTS), expected)  # noqa: S301
    save_family(tmp_path / "other", "roberta")
    copied = pickle.loads(pickled)  # noqa: S301
    for act in (copied.predict, copied.predict, copied.partial_fit, copied.save_pretrained):  # each time
        given = (SUPPORT, LABELS) if act == copied.partial_fit else (tmp_path / "saved",)
        with pytest.raises(AdapterError, match=r"fitted on other weights than those of .*/other: fit it again"):
            act(*(given if act != copied.predict else (TEXTS,)))  # type: ignore[operator]
    assert copied.fit(SUPPORT, LABELS).predict(TEXTS).shape == (6,)


def test_texts_are_cut_where_the_encoder_ends(default: Adapter, tmp_path: Path) -> None:
    config = BertConfig.from_dict({**SIZES, "max_position_embeddings": 16})
    folder = save_tiny_model(tmp_path / "short", BertModel(config, add_pooling_layer=False))
    short = FewShotClassifier(encoder=folder)
    assert short._adapter.encoder.max_length == 16
    with pytest.warns(UserWarning, match="cut at 16 tokens"):
        assert short.fit(SUPPORT, LABELS).predict(["bal " * 30]).shape == (1,)
    assert FewShotClassifier(encoder=folder, max_length=9)._adapter.encoder.max_length == 9
    with pytest.raises(SettingsError, match=r"max_length is 20, but .* has 16 positions"):
        FewShotClassifier(encoder=folder, max_length=20).fit(SUPPORT, LABELS)


def test_numbers_by_layer_go_by_relative_depth(default: Adapter, tmp_path: Path) -> None:
    config = BertConfig.from_dict({**SIZES, "num_hidden_layers": 8})
    theirs = replace(default.initialisation, view_prior=torch.tensor([0.0, 2.0, 6.0]), log_penalty=torch.tensor(0.7))
    save_adapter(tmp_path / "shipped" / "minilm-general", replace(default, initialisation=theirs))
    folder = save_tiny_model(tmp_path / "deep", BertModel(config, add_pooling_layer=False))
    found = FewShotClassifier(encoder=folder)._adapter
    assert found.learner == replace(default.learner, layers=(4, 5, 6, 7, 8))
    assert found.initialisation.view_prior.tolist() == [0.0, 1.0, 2.0, 4.0, 6.0]
    assert found.initialisation.log_step_sizes.shape == (3, 5)
    torch.testing.assert_close(found.initialisation.log_step_sizes[:, ::2], theirs.log_step_sizes)
    assert found.initialisation.log_penalty == theirs.log_penalty


def test_another_encoder_than_that_of_an_adapter_that_was_named_is_refused(default: Adapter, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "other", "bert")
    save_adapter(tmp_path / "named", default)
    for adapter in (default, tmp_path / "named", str(tmp_path / "named")):
        with pytest.raises(AdapterError, match=r"the adapter belongs to .* but the weights of .* are"):
            FewShotClassifier(adapter, encoder=folder).fit(SUPPORT, LABELS)
    with pytest.raises(EncoderError, match="nowhere"):
        FewShotClassifier(encoder=str(tmp_path / "nowhere")).fit(SUPPORT, LABELS)


@pytest.mark.parametrize(
    ("pooling", "prompts", "prompt", "first_token"),
    [
        ({"pooling_mode_cls_token": True}, {"prompts": {"q": "bum "}, "default_prompt_name": "q"}, "bum ", True),
        ({"pooling_mode": "cls"}, {"prompts": {"q": "bum "}, "default_prompt_name": None}, "", True),
        ({"pooling_mode_mean_tokens": True}, {"prompts": {"q": "bum "}, "default_prompt_name": "q"}, "bum ", False),
        ({"pooling_mode": ["cls", "mean"]}, {"prompts": ["q"], "default_prompt_name": ["q"]}, "", False),
    ],
    ids=["both", "cls", "prompt", "odd"],
)
def test_pooling_and_prompt_of_a_sentence_transformers_folder_are_read(
    pooling: object, prompts: object, prompt: str, first_token: bool, default: Adapter, tmp_path: Path
) -> None:
    folder = Path(save_family(tmp_path / "sentence", "bert"))
    (folder / POOLING).parent.mkdir()
    (folder / POOLING).write_text(json.dumps(pooling))
    (folder / PROMPTS).write_text(json.dumps(prompts))
    one = FewShotClassifier(encoder=str(folder)).fit(SUPPORT, LABELS)
    assert (one._adapter.prompt, one._adapter.first_token) == (prompt, first_token)
    plain = states_of(one._learner.reader.encoder, [prompt + text for text in TEXTS])
    for found, expected in zip(one._learner.reader.read(TEXTS).unpadded(), plain, strict=True):
        last = expected[4:, :1].expand(-1, expected.shape[1], -1) if first_token else expected[4:]
        torch.testing.assert_close(found, torch.cat([expected[2:4], last]), rtol=1e-4, atol=1e-4)
    one.save_pretrained(tmp_path / "saved")
    (folder / PROMPTS).unlink()
    shutil.rmtree((folder / POOLING).parent)
    loaded = FewShotClassifier.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.predict_proba(TEXTS), one.predict_proba(TEXTS))
    loaded.merge(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / POOLING).read_text())["pooling_mode_cls_token"] is first_token


def test_an_encoder_from_the_hub(default: Adapter, hub: HubServer, tmp_path: Path) -> None:
    folder = Path(save_family(tmp_path / "other", "bert"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add_repo("lab/encoder", {**files, POOLING: b'{"pooling_mode": "cls"}', "2_Dense/config.json": b"{}"})
    one = FewShotClassifier(encoder="lab/encoder").fit(SUPPORT, LABELS)
    assert one._adapter.first_token
    assert one._adapter.encoder.model == "lab/encoder"
    assert re.fullmatch("[0-9a-f]{40}", one._adapter.commit or "")
    one.save_pretrained(tmp_path / "saved")
    expected = one.predict_proba(TEXTS)
    np.testing.assert_array_equal(FewShotClassifier.from_pretrained(tmp_path / "saved").predict_proba(TEXTS), expected)


def test_an_encoder_that_is_given_as_an_adapter_is_told_as_one(tiny_model: str, hub: HubServer) -> None:
    files = {path.name: path.read_bytes() for path in Path(tiny_model).iterdir()}
    hub.add_repo("lab/encoder", {**files, "pytorch_model.bin": b""})
    for name in (tiny_model, "lab/encoder"):
        message = re.escape(f"is an encoder and no textmeta adapter: write FewShotClassifier(encoder={name!r})")
        with pytest.raises(AdapterError, match=message):
            FewShotClassifier(name).fit(SUPPORT, LABELS)


def test_the_adapter_of_from_pretrained_is_its_name(tiny_model: str) -> None:
    with pytest.raises(SettingsError, match=r"given adapter=None: write FewShotClassifier\(adapter=None"):
        FewShotClassifier.from_pretrained(tiny_model, adapter=None)


@pytest.mark.parametrize("family", ["xlm-roberta", "eurobert"])
def test_any_language_from_files_to_answers(family: str, tmp_path: Path, monkeypatch: Patch, capsys: Shown) -> None:
    """With an encoder that is split, and one that is not: that one's LoRA has to be told where it goes."""
    monkeypatch.setattr(trainer, "CALIBRATION_EPISODES", 4)
    encoder = save_multilingual(tmp_path / "encoder", family)
    for language in LANGUAGES:
        rows = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows_of(language)]
        (tmp_path / "corpora").mkdir(exist_ok=True)
        (tmp_path / "corpora" / f"{language}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    targets = ["--lora.targets", json.dumps(TARGETS[family])] if family in TARGETS else []
    given = ["--data", str(tmp_path / "corpora"), "--encoder", encoder, "--encoder.max_length", "24", *targets]
    main(["train", "--output", str(tmp_path / "run"), "--episodes", "4", "--hold_out", "false", *given])

    for language, classes in LANGUAGES.items():
        texts, labels = zip(*rows_of(language), strict=True)
        one = FewShotClassifier(tmp_path / "run").fit(texts[::2], labels[::2])
        assert one.classes_.tolist() == sorted(classes)
        assert one.score(texts[::2], labels[::2]) > 0.8
        expected = one.predict_proba(texts)
        one.save_pretrained(tmp_path / "saved")
        loaded = FewShotClassifier.from_pretrained(tmp_path / "saved")
        np.testing.assert_array_equal(loaded.predict_proba(texts), expected)
        assert set(loaded.predict(texts)) <= set(classes)
        assert language in [known.corpus for known in loaded.nearest_tasks(4)]
        capsys.readouterr()
        main(["info", str(tmp_path / "saved")])
        shown = capsys.readouterr().out
        assert f"classes    3: {', '.join(sorted(classes))}" in shown
        assert re.search(f"on +.*{language}: {len(texts)} texts, 3 classes", shown)
    unknown = one._learner.reader.encoder.tokenizer.unk_token_id
    assert unknown not in one._learner.reader.encoder.tokenizer(list(texts))["input_ids"][0]


def test_the_device_is_what_there_is(default: Adapter, monkeypatch: Patch) -> None:
    assert FewShotClassifier().device is None
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=cuda: there)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda there=mps: there)
        assert device_of(None) == torch.device(expected)
    assert FewShotClassifier()._learner.reader.encoder.device == torch.device("cpu")


def test_it_moves_fitted_or_not(default: Adapter) -> None:
    one = FewShotClassifier(default, device="cpu").fit(SUPPORT, LABELS)
    expected = one.predict_proba(TEXTS)
    for device, message in (
        ("gpu", "no such device: 'gpu'"),
        ("cuda:77", "no such device: .cuda:77."),
        ("meta", "'meta'"),
    ):
        with pytest.raises(SettingsError, match=message):
            one.to(device)
        with pytest.raises(SettingsError, match=message):
            FewShotClassifier(default, device=device).fit(SUPPORT, LABELS)
    assert one.to(torch.device("cpu")) is one
    np.testing.assert_array_equal(one.predict_proba(TEXTS), expected)


def test_float64_is_asked_for_in_one_place_or_on_the_cpu() -> None:
    """Some devices have none: ``heads.common.float64`` goes to the CPU there."""
    package = Path(textmeta.__file__).parent
    wrong = []
    for folder in ("heads", "meta"):
        for path in (package / folder).glob("*.py"):
            code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            code = code.replace(".cpu().double()", "")
            wrong += [path.name] * ("torch.float64" in code or (".double()" in code and path.name != "common.py"))
    assert not wrong
