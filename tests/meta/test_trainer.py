"""The outer loop: what a step takes, resuming, stopping, validation, and what comes of it."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import WORDS
from tests.given import Patch
from tests.meta.runs import LEARNER, Died, Train, assert_same, on_each_step, rows_of, train_on, trainer_of
from textmeta import Corpus, Episode, EpisodeSampler, EpisodeSettings, MetaTrainer
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.encoder.encoder import EncoderSettings
from textmeta.encoder.pretrained import tensors_digest
from textmeta.errors import AdapterError, DivergedError, SettingsError, TrainingInterrupted
from textmeta.files import CHECKPOINT
from textmeta.heads import HEADS
from textmeta.meta import outer_loop
from textmeta.meta import trainer as trainer_module
from textmeta.meta.algorithms import ALGORITHMS, MetaGradient
from textmeta.meta.evaluation import frozen_prototypes, paired_difference, score_episodes
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner
from textmeta.meta.outer_loop import RECORD
from textmeta.sharing.store import load_adapter


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of one step."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "CALIBRATION_EPISODES", 0)
        train(output, episodes=1)
    return output


# -------------------------------------------------------------------------------------------- what a step is


def test_a_step_takes_mean_gradients_cut_at_1(train: Train, corpus: Corpus, tmp_path: Path, monkeypatch: Patch) -> None:
    usual, alone, seen = ALGORITHMS["maml"].gradient, [], []
    leaves: dict[str, Tensor] = {}

    def gradient(learner: TaskLearner, episodes: Sequence[Episode], given: Mapping[str, Tensor]) -> MetaGradient:
        leaves.update(given)
        seen.append(episodes)
        alone.append([usual(learner, [e], given) for e in episodes])
        return usual(learner, episodes, given)

    monkeypatch.setitem(ALGORITHMS, "maml", replace(ALGORITHMS["maml"], gradient=gradient))
    train(tmp_path, episodes=5, tasks_per_step=3)
    drawn = list(islice(MixedEpisodes([corpus.restrict(corpus.class_names[:5])], seed=0), 5))
    assert [e.support_texts for part in seen for e in part] == [e.support_texts for e in drawn]
    *_, last = alone
    assert len(last) == 2  # all that are left
    mean = {name: (last[0].gradient[name] + last[1].gradient[name]) / 2 for name in last[0].gradient}
    norm = float(torch.cat([value.flatten() for value in mean.values()]).norm())
    assert norm > 1  # it is shortened
    row = rows_of(tmp_path)[-1]
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-3)
    assert row["loss"] == pytest.approx(float(last[0].loss + last[1].loss) / 2, rel=1e-3)
    assert row["accuracy"] == pytest.approx(float(last[0].accuracy + last[1].accuracy) / 2, abs=1e-4)
    assert mean.keys() == leaves.keys()
    for name, value in mean.items():
        torch.testing.assert_close(leaves[name].grad, value / norm, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_algorithm_trains_and_ends_in_the_same_bits_wherever_it_is_stopped(
    train: Train, algorithm: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Once between checkpoints, and once by a signal."""
    seen: list[dict[str, Tensor]] = []
    with monkeypatch.context() as patch:
        on_each_step(patch, algorithm, lambda _, t: seen.append({n: v.detach().clone() for n, v in t.items()}))
        whole = train(tmp_path / "whole", algorithm=algorithm)
    assert len(seen) == 6
    learned = whole.initialisation.tensors()
    assert all(value.isfinite().all() and not value.requires_grad for value in learned.values())
    lora = [name for name in learned if name.startswith("lora.")]
    changed = {name for name in learned if not torch.equal(learned[name], seen[0][name])}
    assert {*lora, "temperature", "centre", "log_name_scale", "view_prior"} <= changed

    def die(begun: int, _: Mapping[str, Tensor]) -> None:
        if begun == 3:  # the last checkpoint is of the second step
            raise Died

    def be_told(begun: int, _: Mapping[str, Tensor]) -> None:
        if begun == 1:  # of those that went on, the fourth in all
            os.kill(os.getpid(), signal.SIGTERM)

    for action, error in ((die, Died), (be_told, TrainingInterrupted)):
        with monkeypatch.context() as patch:
            on_each_step(patch, algorithm, action)
            with pytest.raises(error):
                train(tmp_path / "parts", algorithm=algorithm)
    assert len(rows_of(tmp_path / "parts")) == 4
    assert_same(train(tmp_path / "parts", algorithm=algorithm), whole)
    assert (tmp_path / "parts" / RECORD).read_text() == (tmp_path / "whole" / RECORD).read_text()


def test_an_adapter_says_how_it_was_trained(train: Train) -> None:
    adapter = train(episodes=1, algorithm="anil", learner=LearnerSettings(steps=1))
    assert adapter.learner == LearnerSettings((2, 3, 4), "offset", 1, "prototype")  # the upper half, and what enters it
    told = adapter.record["settings"]
    assert (told["algorithm"], told["episodes"], told["learner"]["adapt"]) == ("anil", 1, "offset")
    assert [each["name"] for each in told["corpora"]] == ["toy"]
    assert adapter.scope.shape == (8,)
    reader = adapter.load_reader()
    assert reader.layers == (2, 3, 4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_where_gradients_are_switched_off(train: Train, mode) -> None:
    expected = train().initialisation.tensors()
    with mode():
        found = train().initialisation.tensors()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_an_encoder_and_a_fixed_tensor_may_be_named_alone(tiny_model: str) -> None:
    assert MetaTrainer(encoder=tiny_model).encoder == EncoderSettings(tiny_model)
    assert MetaTrainer(tiny_model, episodes=7, tasks_per_step=2).steps == 4
    assert MetaTrainer(fixed=["lora."]) == MetaTrainer(fixed="lora.") == MetaTrainer(fixed=("lora.",))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_saves(train: Train, number: int, tmp_path: Path, monkeypatch: Patch) -> None:
    handler = signal.getsignal(number)
    on_each_step(monkeypatch, "maml", lambda begun, _: os.kill(os.getpid(), number) if begun == 2 else None)
    with pytest.raises(TrainingInterrupted, match=r"after step 3 of 6.*goes on") as stopped:
        train(tmp_path)
    assert stopped.value.signum == number
    assert signal.getsignal(number) == handler
    assert len(rows_of(tmp_path)) == 3
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, r"seed: 0 there, 7 now"),
        ({"number_rate": 0.01}, r"number_rate: 0.02 there, 0.01 now"),
        ({"fixed": ("centre",)}, r"fixed: \[\] there, \['centre'\] now"),
        ({"learner": replace(LEARNER, adapt="none")}, r"learner.adapt: 'pooling' there, 'none' now"),
        ({"algorithm": "fomaml"}, r"algorithm: 'maml' there, 'fomaml' now"),
        ({"valid": 3}, r"valid: \[\] there"),
        ({"start": {"pull": torch.tensor(1.0)}}, r"start: None there"),
        ({"name": "another"}, r"corpora: .*'toy'.* there, .*'another'.* now"),
    ],
    ids=["seed", "rate", "fixed", "learner", "algorithm", "valid", "start", "corpus"],
)
def test_another_runs_folder_is_refused_and_left_alone(
    change: dict, named: str, tiny_model: str, corpus: Corpus, finished: Path
) -> None:
    before = (finished / CHECKPOINT).read_bytes()
    change = dict(change)
    corpus = replace(corpus, name=change.pop("name", "toy"))
    with pytest.raises(SettingsError, match=named):
        train_on(tiny_model, corpus, finished, **{"episodes": 1, **change})
    assert (finished / CHECKPOINT).read_bytes() == before


def test_a_checkpoint_of_other_parameters_is_refused_unharmed(train: Train, tmp_path: Path, finished: Path) -> None:
    """Of a version of textmeta that learned one parameter more: its moments would be those of others."""
    path, tensors = tmp_path / CHECKPOINT, {**load_file(finished / CHECKPOINT), "parameters/of_old": torch.zeros(2)}
    with safe_open(finished / CHECKPOINT, framework="pt") as file:
        told = {**json.loads(file.metadata()["state"]), "sha256": tensors_digest(tensors)}
    save_file(tensors, path, {"state": json.dumps(told)})
    before = path.read_bytes()
    with pytest.raises(SettingsError, match=rf"{CHECKPOINT} was written by another version of textmeta: of_old is"):
        train(tmp_path, episodes=1)
    assert path.read_bytes() == before


def test_the_checkpoint_is_plain_tensors(train: Train, tmp_path: Path) -> None:
    train(tmp_path, valid=3, episodes=1)
    assert {name.partition("/")[0] for name in load_file(tmp_path / CHECKPOINT)} == {"parameters", "best", "optimiser"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, RECORD]


def test_where_the_frozen_states_are_kept_has_no_effect_on_the_bits(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    in_memory, written, read = (train(episodes=3, cache=place) for place in (None, folder, folder))
    assert len(list(folder.iterdir())) == 1
    assert_same(written, in_memory)
    assert_same(read, in_memory)


# -------------------------------------------------------------------------------------------- what is learned


def test_episodes_that_what_is_learned_has_no_part_in_are_no_error(train: Train) -> None:
    """The share of unlabelled texts, where none comes with any."""
    tensors = Initialisation.start({}, 32, LearnerSettings((3, 4)), seed=0).tensors()
    fixed = ("lora.", *(name for name in tensors if name != "log_unlabelled_share"))
    how = {"algorithm": "fomaml", "unlabelled": 0.0}
    learned = train(episodes=2, fixed=fixed, **how).initialisation
    assert learned.log_unlabelled_share == tensors["log_unlabelled_share"]


def test_fixed_tensors_stay(train: Train, monkeypatch: Patch) -> None:
    fixed = ("lora.", "queries", "log_evidence")
    seen: list[dict[str, Tensor]] = []
    on_each_step(monkeypatch, "reptile", lambda _, t: seen.append({n: v.detach().clone() for n, v in t.items()}))
    learned = train(episodes=3, fixed=fixed, algorithm="reptile").initialisation.tensors()
    stayed = {name for name in learned if torch.equal(learned[name], seen[0][name])}
    assert {name for name in learned if name.startswith(fixed)} <= stayed
    assert not {"temperature", "centre", "view_prior"} & stayed


ALL_BUT_LORA = tuple(each.name for each in fields(Initialisation) if each.name != "lora")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fixed": ("centres",)}, r"fixed names 'centres', but there are lora\., queries, .*, centre, .*"),
        ({"fixed": ("",)}, r"fixed \(''\) leaves nothing to learn$"),
        ({"fixed": ("lora.", *ALL_BUT_LORA)}, r"fixed \('lora\.', 'queries', .* leaves nothing to learn$"),
    ],
    ids=["unknown", "beginning of all", "all"],
)
def test_fixed_names_tensors_and_leaves_some(train: Train, settings: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=named):
        train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_training_starts_from_what_is_given(train: Train) -> None:
    fixed = ("lora.", "queries")
    given = {"queries": torch.ones(2, 32)}
    one = train(episodes=1, start=given, fixed=("queries",))
    assert torch.equal(one.initialisation.queries, given["queries"])
    two = train(episodes=1, start=one, fixed=fixed, seed=1)
    was, now = one.initialisation.tensors(), two.initialisation.tensors()
    assert all(torch.equal(was[name], now[name]) for name in was if name.startswith(fixed))
    assert not torch.equal(was["temperature"], now["temperature"])
    # one step of Adam goes no further than its rate
    assert all((was[name] - now[name]).abs().max() < 0.021 for name in was)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"queries": torch.ones(3, 32)}, r"queries is \(3, 32\), expected \(2, 32\)"),
        ({"query": torch.ones(2, 32)}, "'query' is not known"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(train: Train, given: dict[str, Tensor], named: str) -> None:
    with pytest.raises(SettingsError, match=f"start does not fit: .*{named}"):
        train(start=given)


def test_the_best_validated_tensors_are_the_result(train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    accuracies, seen = iter([0.5, 0.9, 0.7]), []

    def scores(learner: TaskLearner, episodes: Sequence[object], *, together: bool) -> SimpleNamespace:
        assert together
        seen.append(learner.adapter.initialisation.tensors())
        seen[-1] = {name: value.clone() for name, value in seen[-1].items()}
        assert len(episodes) == 3
        return SimpleNamespace(accuracy=np.full(3, next(accuracies)))

    monkeypatch.setattr(outer_loop, "score_episodes", scores)
    monkeypatch.setattr(outer_loop, "VALIDATE_EVERY", 2)
    monkeypatch.setattr(trainer_module, "VALIDATION_EPISODES", 3)
    found, rows = train(tmp_path, valid=3, episodes=5), rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["loss"] > 0 and 0 <= row["accuracy"] <= 1 and row["gradient_norm"] > 0 for row in rows)
    accuracy = {row["step"]: row["valid_accuracy"] for row in rows if "valid_accuracy" in row}
    assert accuracy == pytest.approx({2: 0.5, 4: 0.9, 5: 0.7})  # the last step, too
    tensors = found.initialisation.tensors()
    assert all(torch.equal(tensors[name], value) for name, value in seen[1].items())
    assert not torch.equal(tensors["temperature"], seen[2]["temperature"])
    # a run that is over still knows its best
    assert_same(train(tmp_path, valid=3, episodes=5), found)


def noisy_corpus() -> Corpus:
    """24 classes; a text has two of the five words that are its class's own, and five words that all texts share."""
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for number in range(24):
        own = WORDS[24 + 5 * number : 29 + 5 * number]
        for _ in range(12):
            texts.append(" ".join(rng.permutation([*rng.choice(own, 2), *rng.choice(WORDS[:24], 5)])))
            labels.append(f"class{number}")
    return Corpus.from_pairs("noisy", texts, labels)


def test_a_trained_adapter_beats_frozen_prototypes_and_its_own_start(tiny_model: str) -> None:
    """On classes that training never saw: their words differ, but that the shared words are noise can be learned."""
    corpus = noisy_corpus()
    seen, held_out = corpus.restrict(corpus.class_names[:16]), corpus.restrict(corpus.class_names[16:])
    settings = LearnerSettings((0, 2, 4), steps=2)
    adapter = trainer_of(tiny_model, learner=settings, episodes=50, tasks_per_step=2, number_rate=0.1).train([seen])
    episodes = EpisodeSampler(held_out, EpisodeSettings(5, 3, 5), seed=1).take(60)
    reader = adapter.load_reader()
    start = Initialisation.start(reader.encoder.factor_shapes, reader.encoder.hidden_size, adapter.learner, seed=0)
    trained = score_episodes(TaskLearner(reader, adapter), episodes)
    untrained = score_episodes(TaskLearner(reader, replace(adapter, initialisation=start)), episodes)
    assert paired_difference(trained, untrained)["low"] > 0.05
    assert paired_difference(trained, frozen_prototypes(reader, episodes))["low"] > 0.15


# -------------------------------------------------------------------------------------------- what goes wrong


def test_a_diverging_run_stops_and_says_where(train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(outer_loop, "CHECKPOINT_EVERY", 1)
    with pytest.raises(DivergedError, match=r"step 6, on \['toy', 'toy'\]"):
        train(tmp_path, number_rate=1e30, episodes=12, tasks_per_step=2)
    assert ["loss" in row for row in rows_of(tmp_path)] == [True, False, False, False, False]
    assert all(value.isfinite().all() for value in load_file(tmp_path / CHECKPOINT).values())


WRONG = {"algorithm": "mamal", "episodes": 0, "tasks_per_step": 0, "lora_rate": 0.0, "number_rate": float("inf")}
WRONG |= {"names": 2.0, "unlabelled": -1.0, "seed": -1, "patience": -1}


@pytest.mark.parametrize("name", WRONG)
def test_settings_out_of_range_are_named(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name} must be .* given"):
        MetaTrainer(**{name: WRONG[name]})  # type: ignore[arg-type]


def test_a_setting_that_the_algorithm_has_another_way_is_refused(monkeypatch: Patch) -> None:
    monkeypatch.setitem(HEADS, "other", HEADS["ridge"])
    for algorithm in ("anil", "protonet"):
        with pytest.raises(SettingsError, match=f"{algorithm} sets the learner's head to 'prototype', given 'other'"):
            MetaTrainer(algorithm=algorithm, learner=LearnerSettings(head="other"))
        with pytest.raises(SettingsError, match=f"{algorithm} sets the learner's adapt to '.*', given 'lora'"):
            MetaTrainer(algorithm=algorithm, learner=LearnerSettings(adapt="lora"))
        MetaTrainer(algorithm=algorithm, learner=LearnerSettings(head="prototype"))
    MetaTrainer(algorithm="maml", learner=LearnerSettings(head="other", adapt="lora"))


def test_a_run_says_that_its_folder_is_no_adapter(finished: Path) -> None:
    with pytest.raises(AdapterError, match=r"it is a run's: `FewShotClassifier\(adapter\)\.save_pretrained` keeps"):
        load_adapter(finished)
