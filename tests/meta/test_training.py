import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from textmeta.data.corpus import Corpus
from textmeta.data.episodes import EpisodeSampler, EpisodeSettings
from textmeta.errors import AdapterError, DivergedError, SettingsError, TrainingInterrupted
from textmeta.meta import training
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.evaluation import frozen_prototypes, paired_difference, score_episodes
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.meta.training import CHECKPOINT, RECORD, TrainingResult, train
from textmeta.meta.training_settings import TrainingSettings
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import LoraSettings

SETTINGS = TrainingSettings(
    steps=6, tasks_per_step=2, warmup=2, validate_every=2, validation_episodes=3, checkpoint_every=2
)
INNER = InnerLoopSettings(steps=2)


def samplers(corpus: Corpus) -> tuple[EpisodeSampler, EpisodeSampler]:
    names, settings = corpus.class_names, EpisodeSettings(3, (1, 3), 3)
    return EpisodeSampler(corpus.restrict(names[:6]), settings, 0), EpisodeSampler(
        corpus.restrict(names[6:]), settings, 1
    )


def run(tiny_model: str, corpus: Corpus, output: Path, settings: TrainingSettings = SETTINGS) -> TrainingResult:
    encoder = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4))
    return train(encoder, *samplers(corpus), settings, INNER, output)


def assert_same(one: TrainingResult, two: TrainingResult) -> None:
    assert one.record == two.record
    assert one.parameters.keys() == two.parameters.keys()
    assert all(torch.equal(value, two.parameters[name]) for name, value in one.parameters.items())


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_run_stopped_anywhere_ends_in_the_same_bits(
    algorithm: str, tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, algorithm=algorithm)
    whole = run(tiny_model, corpus, tmp_path / "whole", settings)
    original, count = training.outer_step, iter(range(100))

    def dying(*arguments: object) -> object:
        if next(count) in (3, 5):  # once between checkpoints, once soon after going on
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "outer_step", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model, corpus, tmp_path / "parts", settings)
    assert_same(run(tiny_model, corpus, tmp_path / "parts", settings), whole)
    records = [(tmp_path / name / RECORD).read_text() for name in ("parts", "whole")]
    assert records[0] == records[1]
    assert [json.loads(line)["step"] for line in records[0].splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_not_run_again(
    tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tiny_model, corpus, tmp_path)
    monkeypatch.setattr(training, "outer_step", lambda *_: pytest.fail("ran again"))
    assert_same(run(tiny_model, corpus, tmp_path), first)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_saves(
    number: signal.Signals, tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_model, corpus, tmp_path / "whole")
    original, handler = training.outer_step, signal.getsignal(number)

    def signalled(*arguments: object) -> object:
        if arguments[5].step == 2:  # type: ignore[attr-defined]
            os.kill(os.getpid(), number)
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "outer_step", signalled)
        with pytest.raises(TrainingInterrupted, match=r"after step [34] of 6.*goes on"):
            run(tiny_model, corpus, tmp_path / "parts")
    assert signal.getsignal(number) == handler
    assert_same(run(tiny_model, corpus, tmp_path / "parts"), whole)


def test_a_killed_process_can_go_on(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import tests.conftest  # as many threads as here: their number changes the last bits
        from textmeta.data.corpus import Corpus
        from tests.meta.test_training import run
        texts, labels = Path(sys.argv[2]).read_text().split("\\n\\n")
        run(sys.argv[1], Corpus.from_pairs("toy", texts.split("\\n"), labels.split("\\n")), Path(sys.argv[3]))
        """
    )
    names = [corpus.class_names[label] for label in corpus.labels]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus.texts) + "\n\n" + "\n".join(names))
    arguments = [sys.executable, "-c", script, tiny_model, str(tmp_path / "corpus.txt"), str(tmp_path / "parts")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "parts" / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (tmp_path / "parts" / CHECKPOINT).exists()
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    whole = run(tiny_model, corpus, tmp_path / "whole")
    assert_same(run(tiny_model, corpus, tmp_path / "parts"), whole)


def test_another_runs_folder_is_refused_and_left_alone(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    run(tiny_model, corpus, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(SettingsError, match=r"training\.seed: 0 there, 7 now"):
        run(tiny_model, corpus, tmp_path, replace(SETTINGS, seed=7))
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_checkpoint_with_other_parameters_is_refused_and_left_alone(
    tiny_model: str, corpus: Corpus, tmp_path: Path
) -> None:
    """Of a version of textmeta that learned one parameter more: its moments would be those of others."""
    run(tiny_model, corpus, tmp_path)
    path = tmp_path / CHECKPOINT
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "parameters/of_old": torch.zeros(2)}, path, metadata)
    before = path.read_bytes()
    with pytest.raises(SettingsError, match=rf"{CHECKPOINT} was written by another version of textmeta: of_old is"):
        run(tiny_model, corpus, tmp_path)
    assert path.read_bytes() == before


def test_a_damaged_checkpoint_is_named(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(AdapterError, match=CHECKPOINT):
        run(tiny_model, corpus, tmp_path)


def test_the_cache_has_no_effect_on_the_bits(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    results = []
    for cache_mb in (0, 100):
        encoder = Encoder(EncoderSettings(tiny_model, max_length=32, cache_mb=cache_mb), LoraSettings(rank=4))
        results.append(train(encoder, *samplers(corpus), SETTINGS, INNER, tmp_path / str(cache_mb)))
    assert_same(*results)


def test_the_best_validated_parameters_are_the_result(
    tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies, seen = iter([0.5, 0.9, 0.7]), []

    def fake(encoder: Encoder, parameters: dict[str, torch.Tensor], *_: object) -> object:
        seen.append({name: value.detach().clone() for name, value in parameters.items()})
        accuracy = next(accuracies)
        return type("Scores", (), {"accuracy": torch.tensor([accuracy] * 3).numpy()})()

    monkeypatch.setattr(training, "score_episodes", fake)
    result = run(tiny_model, corpus, tmp_path)
    assert result.record["best_step"] == 4
    assert all(torch.equal(result.parameters[name], value) for name, value in seen[1].items())


def test_training_on_the_toy_corpus_beats_frozen_prototypes(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    """On classes that training never saw: its words differ, but that the shared noise is noise can be learned."""
    settings = TrainingSettings(algorithm="protonet", steps=60, learning_rate=0.02, warmup=5, validate_every=20)
    encoder = Encoder(EncoderSettings(tiny_model, max_length=32), LoraSettings(rank=4, layers=4))
    result = train(encoder, *samplers(corpus), settings, INNER, tmp_path)
    episodes = samplers(corpus)[0].take(150, start=10_000)
    before, after = (
        frozen_prototypes(encoder, episodes),
        score_episodes(encoder, result.parameters, episodes, result.inner),
    )
    assert paired_difference(after, before)["low"] > 0.02


def test_the_checkpoint_is_plain_tensors(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    run(tiny_model, corpus, tmp_path)
    kinds = {name.partition("/")[0] for name in load_file(tmp_path / CHECKPOINT)}
    assert kinds == {"parameters", "best", "optimiser"}


@pytest.mark.parametrize(
    "wrong", [{"algorithm": "mamal"}, {"steps": 0}, {"tasks_per_step": 0}, {"max_gradient_norm": 0.0}, {"seed": -1}]
)
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=str(next(iter(wrong)))):
        TrainingSettings(**wrong)  # type: ignore[arg-type]


def test_a_signal_in_the_last_step_is_not_lost(
    tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training._validate

    def signalled(encoder: Encoder, state: object, *arguments: object) -> object:
        if state.step == SETTINGS.steps:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)
        return original(encoder, state, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "_validate", signalled)
        with pytest.raises(TrainingInterrupted, match="after step 6 of 6"):
            run(tiny_model, corpus, tmp_path)
    assert run(tiny_model, corpus, tmp_path).record["steps"] == 6


def test_a_diverging_run_stops_and_says_where(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"step 2: loss nan"):
        run(tiny_model, corpus, tmp_path, replace(SETTINGS, learning_rate=1e30))


def test_gradients_can_be_left_unclipped(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    clipped, free = (
        run(tiny_model, corpus, tmp_path / str(norm), replace(SETTINGS, max_gradient_norm=norm))
        for norm in (1e-3, None)
    )
    assert any(not torch.equal(value, free.parameters[name]) for name, value in clipped.parameters.items())


def test_each_outer_step_takes_the_meta_gradient_that_is_set(
    tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[MetaGradientSettings] = []
    row = ALGORITHMS["maml"]

    def recording(encoder: Encoder, *arguments: object) -> object:
        plans.append(arguments[-1])  # type: ignore[arg-type]
        return row.gradient(encoder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setitem(ALGORITHMS, "maml", replace(row, gradient=recording))
    given = MetaGradientSettings(second_order_steps=1, texts_at_once=20)
    run(tiny_model, corpus, tmp_path, replace(SETTINGS, algorithm="maml", meta_gradient=given))
    assert plans == [given] * 6


def test_second_order_and_first_order_learn_something_else(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    results = [
        run(tiny_model, corpus, tmp_path / name, replace(SETTINGS, algorithm=name)).parameters
        for name in ("maml", "fomaml")
    ]
    truncated = replace(SETTINGS, algorithm="maml", meta_gradient=MetaGradientSettings(second_order_steps=0))
    results.append(run(tiny_model, corpus, tmp_path / "truncated", truncated).parameters)
    name = next(name for name in results[0] if ".lora_B." in name)
    assert not torch.equal(results[0][name], results[1][name])
    assert torch.equal(results[1][name], results[2][name])  # through no step is FOMAML


def test_a_run_can_go_on_with_less_memory(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    settings = replace(SETTINGS, algorithm="maml")
    frugal = replace(settings, meta_gradient=MetaGradientSettings(checkpointed=True, texts_at_once=20))
    first = run(tiny_model, corpus, tmp_path, settings)
    assert_same(run(tiny_model, corpus, tmp_path, frugal), first)  # finished already
    with pytest.raises(SettingsError, match="second_order_steps: None there, 1 now"):
        run(tiny_model, corpus, tmp_path, replace(settings, meta_gradient=MetaGradientSettings(second_order_steps=1)))
