"""The outer loop and what it makes: training, resuming, and the adapter on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from tests.conftest import save_tiny_model
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings, with_unlabelled
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, DivergedError, SettingsError
from textmeta.meta.adapter import CoreAdapter
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner
from textmeta.meta.trainer import CORE_ALGORITHMS, MetaTrainer, OuterSettings, query_losses
from textmeta.model.encoder import Encoder

LAYERS = (2, 4)
LEARNER = LearnerSettings(LAYERS, steps=2)


class Stopped(Exception):  # noqa: N818
    pass


class Mixed:
    """Episodes with names, unlabelled texts and unequal classes; an end or a zero-shot one here and there."""

    def __init__(self, corpus: Corpus, end: int = 10**9) -> None:
        settings = EpisodeSettings(3, (1, 3), 2, unbalanced=True, label_names=0.5)
        self.corpus, self.sampler, self.end = corpus, EpisodeSampler(corpus, settings, seed=0), end
        self.nameless = EpisodeSampler(corpus, EpisodeSettings(3, (0, 2), 2, label_names=1.0), seed=1)

    def __getitem__(self, index: int) -> Episode:
        if index >= self.end:
            raise Stopped
        episode = (self.nameless if index % 4 == 3 else self.sampler)[index]
        return with_unlabelled(episode, self.corpus, 0, index, per_class=2) if index % 3 == 1 else episode


def trainer_of(encoder: Encoder, learner: LearnerSettings = LEARNER, **settings) -> MetaTrainer:
    outer = OuterSettings(**{"episodes": 12, "checkpoint_every": 1, "warmup": 2, **settings})
    return MetaTrainer(TokenStateReader(encoder, learner.layers), learner, outer)


def same(one: Initialisation, other: Initialisation) -> bool:
    left, right = one.tensors(), other.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("algorithm", CORE_ALGORITHMS)
def test_every_algorithm_learns(encoder: Encoder, corpus: Corpus, tmp_path: Path, algorithm: str):
    trainer = trainer_of(encoder, algorithm=algorithm, episodes=4)
    learned = trainer.train(Mixed(corpus), tmp_path)
    tensors, start = learned.tensors(), trainer.shape.tensors()
    assert all(value.isfinite().all() for value in tensors.values())
    assert all(not torch.equal(tensors[n], start[n]) for n in ("temperature", "log_name_scale", "centre"))
    assert any(not torch.equal(tensors[n], start[n]) for n in tensors if n.startswith("lora."))
    rows = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert not any(value.requires_grad for value in tensors.values())


@pytest.mark.parametrize("algorithm", CORE_ALGORITHMS)
@pytest.mark.parametrize("adapt", ["none", "pooling", "lora", "pooling+lora"])
def test_every_algorithm_has_a_finite_gradient_of_every_tensor(
    encoder: Encoder, corpus: Corpus, algorithm: str, adapt: str
):
    trainer = trainer_of(encoder, replace(LEARNER, adapt=adapt, steps=1), algorithm=algorithm)  # type: ignore[arg-type]
    leaves = {name: value.clone().requires_grad_() for name, value in trainer.shape.tensors().items()}
    learner = TaskLearner(trainer.reader, trainer.shape.with_tensors(leaves), trainer.learner)
    episodes = [Mixed(corpus)[number] for number in (0, 1, 3)]
    gradients, loss, accuracy = trainer.algorithm.gradient(learner, episodes, leaves)
    assert gradients.keys() == leaves.keys()
    assert all(gradients[name].shape == leaf.shape for name, leaf in leaves.items())
    assert all(part.isfinite().all() and not part.requires_grad for part in gradients.values())
    assert loss.shape == accuracy.shape == (3,)
    assert loss.isfinite().all()
    assert ((accuracy >= 0) & (accuracy <= 1)).all()


def test_training_lowers_the_loss_of_what_it_sees(encoder: Encoder, corpus: Corpus, tmp_path: Path):
    episodes = [EpisodeSampler(corpus, EpisodeSettings(3, 3, 4), seed=0)[i] for i in range(2)]

    class Same:
        def __getitem__(self, index: int) -> Episode:
            return episodes[index % 2]

    trainer = trainer_of(encoder, episodes=24, lora_rate=5e-3)
    learned = trainer.train(Same(), tmp_path)
    before, after = (
        float(query_losses(TaskLearner(trainer.reader, part, trainer.learner), episodes, False)[0].mean())
        for part in (trainer.shape, learned)
    )
    assert after < before - 0.05


@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_a_resumed_run_has_the_same_bits(encoder: Encoder, corpus: Corpus, tmp_path: Path, algorithm: str):
    told = {"corpora": ["toy"]}
    whole = trainer_of(encoder, algorithm=algorithm).train(Mixed(corpus), tmp_path / "whole", told)
    with pytest.raises(Stopped):
        trainer_of(encoder, algorithm=algorithm).train(Mixed(corpus, end=6), tmp_path / "parts", told)
    assert len((tmp_path / "parts/record.jsonl").read_text().splitlines()) == 3
    resumed = trainer_of(encoder, algorithm=algorithm).train(Mixed(corpus), tmp_path / "parts", told)
    assert same(whole, resumed)
    assert (tmp_path / "whole/record.jsonl").read_text() == (tmp_path / "parts/record.jsonl").read_text()
    again = trainer_of(encoder, algorithm=algorithm).train(Mixed(corpus, end=0), tmp_path / "whole", told)
    assert same(whole, again)  # finished: nothing is read


def test_steps_between_checkpoints_are_taken_again(encoder: Encoder, corpus: Corpus, tmp_path: Path):
    whole = trainer_of(encoder, checkpoint_every=2).train(Mixed(corpus), tmp_path / "whole")
    with pytest.raises(Stopped):
        trainer_of(encoder, checkpoint_every=2).train(Mixed(corpus, end=10), tmp_path / "parts")
    assert same(whole, trainer_of(encoder, checkpoint_every=2).train(Mixed(corpus), tmp_path / "parts"))
    assert (tmp_path / "whole/record.jsonl").read_text() == (tmp_path / "parts/record.jsonl").read_text()


CHANGES = [
    {"settings": {"number_rate": 0.01}},
    {"settings": {"fixed": ("centre",)}},
    {"learner": LearnerSettings(LAYERS, steps=2, adapt="none")},
    {"told": {"corpora": ["another"]}},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_folder_of_a_run_with_other_settings_is_refused(
    encoder: Encoder, corpus: Corpus, tmp_path: Path, change: dict
):
    told = {"corpora": ["toy"]}
    trainer_of(encoder, episodes=2).train(Mixed(corpus), tmp_path, told)
    other = trainer_of(encoder, change.get("learner", LEARNER), **{"episodes": 2, **change.get("settings", {})})
    with pytest.raises(SettingsError, match="other settings"):
        other.train(Mixed(corpus), tmp_path, change.get("told", told))


def test_a_run_from_another_start_is_refused(encoder: Encoder, corpus: Corpus, tmp_path: Path):
    trainer = trainer_of(encoder, episodes=2)
    trainer.train(Mixed(corpus), tmp_path)
    with pytest.raises(SettingsError):
        trainer.train(Mixed(corpus), tmp_path, start={"queries": torch.ones(2, encoder.hidden_size)})


def test_fixed_tensors_stay(encoder: Encoder, corpus: Corpus, tmp_path: Path):
    fixed = ("lora.", "queries", "log_evidence")
    trainer = trainer_of(encoder, episodes=4, fixed=fixed)
    learned, start = trainer.train(Mixed(corpus), tmp_path).tensors(), trainer.shape.tensors()
    for name in start:
        if name.startswith(fixed):
            assert torch.equal(learned[name], start[name]), name
    assert not torch.equal(learned["temperature"], start["temperature"])


def test_reptile_has_no_gradient_of_what_is_fixed(encoder: Encoder, corpus: Corpus):
    trainer = trainer_of(encoder, algorithm="reptile")
    leaves = {n: value.clone().requires_grad_() for n, value in trainer.shape.tensors().items() if n != "queries"}
    tensors = {**trainer.shape.tensors(), **leaves}
    learner = TaskLearner(trainer.reader, trainer.shape.with_tensors(tensors), trainer.learner)
    gradients, _, _ = trainer.algorithm.gradient(learner, [Mixed(corpus)[0]], leaves)
    assert gradients.keys() == leaves.keys()


def test_training_starts_from_given_tensors(encoder: Encoder, corpus: Corpus, tmp_path: Path):
    given = {"queries": torch.ones(2, encoder.hidden_size)}
    trainer = trainer_of(encoder, episodes=2, fixed=("queries",))
    assert torch.equal(trainer.train(Mixed(corpus), tmp_path, start=given).queries, given["queries"])


@pytest.mark.parametrize("name", ["temperature", "queries", "log_penalty"])
def test_what_is_not_finite_stops_training(encoder: Encoder, corpus: Corpus, tmp_path: Path, name: str):
    trainer = trainer_of(encoder)
    broken = torch.full_like(trainer.shape.tensors()[name], torch.nan)
    with pytest.raises(DivergedError):
        trainer.train(Mixed(corpus), tmp_path, start={name: broken})
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("change", [{"algorithm": "sgd"}, {"episodes": 0}, {"tasks_per_step": 0}, {"warmup": 0}])
def test_settings_out_of_range_are_refused(change: dict):
    with pytest.raises(SettingsError):
        OuterSettings(**change)


# ---------------------------------------------------------------------------------------------- the adapter on disk


def make_adapter(encoder: Encoder, rule: Tensor | None = None) -> CoreAdapter:
    start = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, LEARNER, seed=1)
    generator = torch.Generator().manual_seed(0)
    moved = {n: value + torch.randn(value.shape, generator=generator) for n, value in start.tensors().items()}
    told = {"corpora": ["toy"]}
    return CoreAdapter(
        encoder.settings, encoder.weights_sha256, encoder.lora, LEARNER, start.with_tensors(moved), rule, told
    )


@pytest.mark.parametrize("rule", [None, torch.arange(8.0)], ids=["no scope", "scope"])
def test_an_adapter_comes_back_as_it_was(encoder: Encoder, tmp_path: Path, rule: Tensor | None):
    adapter = make_adapter(encoder, rule)
    adapter.save(tmp_path)
    loaded, reader = CoreAdapter.load(tmp_path)
    assert same(loaded.initialisation, adapter.initialisation)
    assert (loaded.learner, loaded.lora, loaded.encoder) == (adapter.learner, adapter.lora, adapter.encoder)
    assert loaded.record == {"corpora": ["toy"]}
    assert reader.layers == LAYERS
    assert loaded.scope_rule is None if rule is None else torch.equal(loaded.scope_rule, rule)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core.json", "core.safetensors"]


def change_tensors(folder: Path, **changed: Tensor | None) -> None:
    tensors = {**load_file(folder / "core.safetensors"), **changed}
    save_file({n: value for n, value in tensors.items() if value is not None}, folder / "core.safetensors")


def change_told(folder: Path, **changed: object) -> None:
    told = {**json.loads((folder / "core.json").read_text()), **changed}
    told = {name: value for name, value in told.items() if value is not None}
    (folder / "core.json").write_text(json.dumps(told))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGE = {
    "no numbers": lambda folder: (folder / "core.json").unlink(),
    "no tensors": lambda folder: (folder / "core.safetensors").unlink(),
    "numbers cut": lambda folder: cut(folder / "core.json"),
    "tensors cut": lambda folder: cut(folder / "core.safetensors"),
    "not a mapping": lambda folder: (folder / "core.json").write_text("[]"),
    "other format": lambda folder: change_told(folder, format=7),
    "no layers": lambda folder: change_told(folder, learner={"adapt": "none"}),
    "unknown setting": lambda folder: change_told(folder, lora={"targets": None, "speed": 3}),
    "unknown adapt": lambda folder: change_told(folder, learner={"layers": [2, 4], "adapt": "all"}),
    "no hash": lambda folder: change_told(folder, encoder_sha256=None),
    "no record": lambda folder: change_told(folder, record=None),
    "layer too high": lambda folder: change_told(folder, learner={"layers": [2, 9], "steps": 2}),
    "layers are words": lambda folder: change_told(folder, learner={"layers": ["a", "b"], "steps": 2}),
    "steps is a word": lambda folder: change_told(folder, learner={"layers": [2, 4], "steps": "two"}),
    "wrong shape": lambda folder: change_tensors(folder, queries=torch.zeros(3, 32)),
    "missing tensor": lambda folder: change_tensors(folder, pull=None),
    "unknown tensor": lambda folder: change_tensors(folder, push=torch.zeros(1)),
    "not finite": lambda folder: change_tensors(folder, centre=torch.full((2, 32), torch.inf)),
    "integers": lambda folder: change_tensors(folder, centre=torch.zeros(2, 32, dtype=torch.int64)),
    "scope of wrong shape": lambda folder: change_tensors(folder, scope_rule=torch.zeros(3)),
    "scope not finite": lambda folder: change_tensors(folder, scope_rule=torch.full((8,), torch.nan)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_is_refused(encoder: Encoder, tmp_path: Path, kind: str):
    make_adapter(encoder, torch.arange(8.0)).save(tmp_path)
    DAMAGE[kind](tmp_path)
    with pytest.raises(AdapterError):
        CoreAdapter.load(tmp_path)


def test_another_encoder_is_refused(encoder: Encoder, tmp_path: Path):
    make_adapter(encoder).save(tmp_path / "adapter")
    config = BertConfig(
        vocab_size=160, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64
    )
    other = save_tiny_model(tmp_path / "other", BertModel(config, add_pooling_layer=False))
    told = json.loads((tmp_path / "adapter/core.json").read_text())
    change_told(tmp_path / "adapter", encoder={**told["encoder"], "model": other})
    with pytest.raises(AdapterError, match="another encoder"):
        CoreAdapter.load(tmp_path / "adapter")


@pytest.mark.parametrize("wrong", [{"adapt": "all"}, {"head": "nearest"}, {"steps": -1}])
def test_learner_settings_out_of_range_are_refused(wrong: dict):
    with pytest.raises(SettingsError):
        LearnerSettings(**wrong)


def test_fixed_names_must_be_known(encoder: Encoder):
    with pytest.raises(SettingsError, match="centres"):
        trainer_of(encoder, fixed=("centres",))
