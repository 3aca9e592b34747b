"""What is told before a run starts, and what a step does with tasks that it cannot learn from."""

import logging
import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from tests.conftest import WORDS, save_tiny_model, write_rows
from tests.given import Logged, Patch, Shown, doubled
from tests.meta.runs import LEARNER, Train, assert_same, rows_of, trainer_of
from textmeta import Corpus, Episode
from textmeta.cli import main
from textmeta.data.mixed_episodes import MixedEpisodes
from textmeta.encoder.encoder import Encoder
from textmeta.errors import DataError, DivergedError, SettingsError
from textmeta.files import CHECKPOINT
from textmeta.meta import plan as plan_module
from textmeta.meta.algorithms import ALGORITHMS, MetaGradient
from textmeta.meta.learner import TaskLearner

ROOT = Path(__file__).parents[2]
Gradient = Callable[[TaskLearner, Sequence[Episode], Mapping[str, Tensor]], MetaGradient]


def corpus_of_five(corpus: Corpus) -> Corpus:
    return corpus.restrict(corpus.class_names[:5])


def instead(monkeypatch: Patch, change: Callable[[Gradient, Sequence[Episode]], None]) -> list[int]:
    """Let what is learned from episodes be changed, or fail, first; return the numbers of tasks that were asked for."""
    usual, asked = ALGORITHMS["maml"].gradient, []

    def gradient(learner: TaskLearner, episodes: Sequence[Episode], leaves: Mapping[str, Tensor]) -> MetaGradient:
        asked.append(len(episodes))
        found = usual(learner, episodes, leaves)
        change(found, episodes)
        return found

    monkeypatch.setitem(ALGORITHMS, "maml", replace(ALGORITHMS["maml"], gradient=gradient))
    return asked


def supports(corpus: Corpus, *numbers: int) -> list[tuple[str, ...]]:
    episodes = MixedEpisodes([corpus_of_five(corpus)], seed=0)
    return [episodes[number].support_texts for number in numbers]


def test_the_plan_says_what_is_learned_from_what(train: Train, tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model, episodes=7, tasks_per_step=2)
    valid = replace(corpus.restrict(corpus.class_names[5:]), name="others")
    plan = trainer.plan(corpus_of_five(corpus), valid, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    learned = train(episodes=1).initialisation
    count, lora = (sum(value.numel() for value in own.values()) for own in (learned.tensors(), learned.lora))
    others = count - lora - learned.queries.numel()
    for line in (
        r"corpora +toy, 80 texts of 5 classes",
        r"chosen by +others, 112 texts of 7 classes",
        rf"encoder +{re.escape(tiny_model)}, texts cut at 32 tokens",
        rf"learned +{count:,} numbers in \d+ tensors: LoRA {lora:,}, pooling queries 64, others {others}",
        r"algorithm +maml, 2 steps on pooling, head ridge",
        r"episodes +7: 4 steps of 2, 4 of them left",
        r"device +cpu, precision no; processes: 1 of 1 threads",
        r"time +0:00:0\d: 0:00:0\d for frozen layers, about 0\.\d+ s a step",
        r"memory +\S+ [MG]iB at most in a process, in a step of \d+ texts; frozen states of all texts are \d\.\d MiB",
        r"disk +0.1 MiB at most in .*/run, where \S+ GiB are free",
    ):
        assert re.search(f"^{line}", plan, re.M), (line, plan)
    many = [replace(corpus.restrict(corpus.class_names[:n]), name=f"of{n}") for n in (4, 2, 12, 3)]
    assert re.search(r"corpora +4, 336 texts of 21 classes: 2 \(of2\) to 12 \(of12\)$", trainer.plan(many), re.M)


def test_what_was_measured_is_remembered(tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(plan_module, "REMEMBERED", tmp_path / "plans")
    asked = instead(monkeypatch, lambda *_: None)
    trainer = trainer_of(tiny_model)
    first, again = trainer.plan(corpus), trainer.plan(corpus)
    assert len(asked) == 1
    assert re.sub(r" \(measured 20\d\d-\d\d-\d\d \d\d:\d\d\)", "", again) == first != again
    for content in ("[1.0,", "[1, 2]", "null", '["a", 1, 1, 1, 1]'):
        for kept in (tmp_path / "plans").iterdir():
            kept.write_text(content)
        assert "measured" not in trainer.plan(corpus)
    replace(trainer, seed=1).plan(corpus)
    assert len(asked) == 6


@pytest.mark.parametrize("adapt", ["pooling", "lora"])
def test_the_largest_step_is_measured_and_changes_no_bit(
    train: Train, adapt: str, corpus: Corpus, tmp_path: Path, caplog: Logged
) -> None:
    settings = {"learner": replace(LEARNER, adapt=adapt), "tasks_per_step": 2, "episodes": 6}
    silent = train(tmp_path / "silent", **settings)
    drawn = [
        len(e.support_texts + e.query_texts + (e.label_names or ()) + e.unlabelled_texts)
        for e in map(MixedEpisodes([corpus_of_five(corpus)], seed=0).__getitem__, range(6))
    ]
    with caplog.at_level(logging.INFO, "textmeta"):
        told = train(tmp_path / "told", **settings)
    assert_same(told, silent)
    assert rows_of(tmp_path / "told") == rows_of(tmp_path / "silent")
    assert f"in a step of {max(a + b for a, b in zip(drawn[::2], drawn[1::2], strict=True))} texts" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "textmeta"):
        train(tmp_path / "told", **settings)
    assert "memory" not in caplog.text, "a run that is over"


def test_dry_run_prints_the_plan_alone(tiny_model: str, corpus: Corpus, tmp_path: Path, capsys: Shown) -> None:
    data = write_rows(tmp_path / "toy.jsonl", corpus)
    given = ["train", "--data", str(data), "--encoder.model", tiny_model, "--test_shots", "[1]"]
    for more in ([], ["--output", str(tmp_path / "run")]):
        main([*given, "--dry-run", *more])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "corpora    toy, 96 texts of 6 classes"
        assert len(lines) == 9 + bool(more)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.jsonl"]
    with pytest.raises(SystemExit):
        main(given)
    assert "give --output FOLDER" in capsys.readouterr().err


TOLD_AND_TAKEN = """
    import sys
    import numpy as np
    from textmeta import Corpus, MetaTrainer
    from textmeta.encoder.encoder import EncoderSettings
    from textmeta.meta import plan, trainer
    from textmeta.meta.initialisation import LearnerSettings
    import torch
    trainer.CALIBRATION_EPISODES = 0
    model, algorithm, adapt, what = sys.argv[1:]
    rng = np.random.default_rng(0)
    words = open(model + "/words").read().split()
    texts = [" ".join(rng.choice(words, rng.integers(5, 60))) for _ in range(20 * 30)]
    corpus = Corpus.from_pairs("random", texts, [f"class{i % 30}" for i in range(600)])
    learner = LearnerSettings(adapt=adapt, steps=2)
    how = MetaTrainer(EncoderSettings(model, max_length=64), algorithm=algorithm, learner=learner, episodes=8)
    if what == "told":
        size = plan._size
        plan._size = lambda count: f"{count:.0f}"
        print(how.plan(corpus))
    else:
        how.train(corpus)
        print(plan._peak_memory(torch.device("cpu")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapt", ["pooling", "lora"])
@pytest.mark.parametrize("algorithm", ["fomaml", "maml"])
def test_the_memory_told_is_about_what_is_taken(algorithm: str, adapt: str, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=160, hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768
    )
    model = save_tiny_model(tmp_path, BertModel(config, add_pooling_layer=False))
    (tmp_path / "words").write_text(" ".join(WORDS))
    shown = {}
    for what in ("told", "taken"):
        command = [sys.executable, "-c", textwrap.dedent(TOLD_AND_TAKEN), model, algorithm, adapt, what]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        shown[what] = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    told = int(re.search(r"memory +(\d+) at most", shown["told"])[1])  # type: ignore[index]
    taken = int(shown["taken"].split()[-1])
    assert 0.7 * taken < told < 1.3 * taken


# what is in the way is said before


@pytest.mark.parametrize("place", ["file/run", "read-only/run"])
def test_an_output_that_cannot_be_written_is_told(place: str, tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.symlink("/proc/self", tmp_path / "read-only")  # where nobody, and not root either, may make a file
    with pytest.raises(SettingsError, match=rf"nothing can be written to .*{place}: "):
        trainer_of(tiny_model).plan(corpus, output=tmp_path / place)


def test_a_full_disk_is_said_before(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=16k tmpfs {folder} 2> /dev/null"):
        pytest.skip("nothing may be mounted here")
    try:
        with pytest.raises(SettingsError, match=r"take about 0.1 MiB, but .*small has 0.0 MiB free"):
            train(folder / "run")
        (folder / "fill").write_bytes(bytes(16 * 1024))
        with pytest.raises(SettingsError, match=r"nothing can be written to .*/run: .*No space left"):
            train(folder / "run")
    finally:
        os.system(f"umount {folder}")


def test_a_run_that_goes_on_may_write_over_its_own_files(
    train: Train, tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: Patch
) -> None:
    train(tmp_path, callback=lambda row: row["step"] == 1)
    needed = plan_module.bytes_of(trainer_of(tiny_model)._begin(corpus_of_five(corpus), (), tmp_path, None, None))
    free = needed - (tmp_path / CHECKPOINT).stat().st_size
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    train(tmp_path)
    assert len(rows_of(tmp_path)) == 6
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "corpus.csv").write_text("carried over " * 10**5)
    with pytest.raises(SettingsError, match=r"take about 0.1 MiB, but"):
        train(tmp_path / "new")


def test_what_is_written_is_no_more_than_is_told(train: Train, tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    run = trainer_of(tiny_model)._begin(corpus_of_five(corpus), (), tmp_path, None, None)
    told = plan_module.bytes_of(run)
    train(tmp_path)
    checkpoint = (tmp_path / CHECKPOINT).stat().st_size
    assert checkpoint < told < 4 * checkpoint


def test_a_text_that_the_tokenizer_fails_on_is_named(train: Train, corpus: Corpus, monkeypatch: Patch) -> None:
    usual, given = Encoder.tokenize, corpus_of_five(corpus)

    def tokenize(self: Encoder, texts: Sequence[str]) -> list[list[list[int]]]:
        if given.texts[17] in texts:
            raise OverflowError("too large")
        return usual(self, texts)

    monkeypatch.setattr(Encoder, "tokenize", tokenize)
    with pytest.raises(DataError, match=rf"'toy', row 17: the tokenizer fails on '{given.texts[17]:.10}.*: too large"):
        train()


# tasks that cannot be learned from


@pytest.mark.parametrize("fault", ["loss", "gradient", "singular"])
def test_a_task_that_is_not_finite_is_left_out_and_named(
    train: Train, fault: str, corpus: Corpus, tmp_path: Path, monkeypatch, caplog: Logged
) -> None:
    (bad,) = supports(corpus, 4)
    found = []

    def break_it(gradient: MetaGradient, episodes: Sequence[Episode]) -> None:
        found.append(([e.support_texts for e in episodes], gradient))
        for row, episode in enumerate(episodes):
            if episode.support_texts == bad:
                if fault == "singular":
                    raise torch.linalg.LinAlgError("not positive-definite")
                gradient.loss[row] = math.nan if fault == "loss" else gradient.loss[row]
                gradient.gradient["queries"][0, 0] = math.nan if fault == "gradient" else 0.0

    asked = instead(monkeypatch, break_it)
    train(tmp_path, episodes=9, tasks_per_step=3)
    assert asked == [3, 3, 1, 2, 1, 1, 3]
    row = rows_of(tmp_path)[1]
    assert row["dropped"] == [{"episode": 4, "corpus": "toy"}]
    left = [float(g.loss) for texts, g in found if len(texts) == 1 and texts[0] != bad]
    assert row["loss"] == pytest.approx(sum(left) / 2, abs=1e-4)
    assert ["dropped" in row for row in rows_of(tmp_path)] == [False, True, False]
    assert "step 2: no finite loss and gradient on episode 4 of toy: left out" in caplog.text


def test_steps_of_bad_tasks_change_nothing_until_too_many(train: Train, tmp_path: Path, monkeypatch: Patch) -> None:
    begun = 0

    def break_it(gradient: MetaGradient, episodes: Sequence[Episode]) -> None:
        nonlocal begun
        begun += 1
        if begun in (2, 3) or begun > 4:
            gradient.loss[:] = math.nan

    instead(monkeypatch, break_it)
    with pytest.raises(DivergedError, match=r"step 9, on \['toy'\]: the last 5 steps had no finite"):
        train(tmp_path, episodes=12)
    rows = rows_of(tmp_path)
    assert ["loss" in row for row in rows] == [True, False, False, True, *[False] * 4]
    monkeypatch.undo()
    short = train(tmp_path, episodes=12)  # the checkpoint is of step 4, and whole
    assert all(value.isfinite().all() for value in short.initialisation.tensors().values())
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, 13))


OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_step_too_large_for_memory_is_halved(error: str, tiny_model: str, corpus: Corpus, monkeypatch: Patch) -> None:
    run = trainer_of(tiny_model)._begin(corpus_of_five(corpus), (), None, None, None)
    doubled(run.reader.encoder)
    state = run.state()
    state.parameters = {name: value.detach().double().requires_grad_() for name, value in state.parameters.items()}
    episodes = {number: run.episodes[number] for number in range(3)}
    whole, _ = run.own_share(state, episodes)

    def fill(_: MetaGradient, episodes: Sequence[Episode]) -> None:
        if len(episodes) > 1:
            raise OUT_OF_MEMORY[error]

    asked = instead(monkeypatch, fill)
    halved, dropped = run.own_share(state, episodes)
    assert (asked, dropped) == ([3, 1, 2, 1, 1], set())
    torch.testing.assert_close(halved, whole, rtol=1e-6, atol=1e-9)


def test_a_task_too_large_for_the_memory_is_named(train: Train, corpus: Corpus, monkeypatch: Patch) -> None:
    """Other errors come through."""
    (large,) = supports(corpus, 1)
    named = rf"step 1: the memory of cpu is too small for episode 1 alone \(toy, {len(large)} examples of \d+ classes\)"
    other = RuntimeError("The size of tensor a (3) must match")
    for error, kind, told in ((OUT_OF_MEMORY["cpu"], SettingsError, named), (other, RuntimeError, "must match")):

        def fail(_: MetaGradient, episodes: Sequence[Episode], error: Exception = error) -> None:
            if large in [e.support_texts for e in episodes]:
                raise error

        with monkeypatch.context() as patch:
            instead(patch, fail)
            with pytest.raises(kind, match=told):
                train(tasks_per_step=2)


FULL = """
    import resource, sys
    from pathlib import Path
    from tests.meta.runs import trainer_of
    from textmeta import Corpus
    from textmeta.encoder.encoder import EncoderSettings
    from textmeta.errors import SettingsError
    texts = [f"{i} " + "bab " * 500 for i in range(600)]
    corpus = Corpus.from_pairs("long", texts, [f"class{i % 30}" for i in range(600)])
    trainer = trainer_of(sys.argv[1], encoder=EncoderSettings(sys.argv[1], max_length=512))
    run = trainer._begin([corpus], (), None, None, None)
    episodes = sorted(map(run.episodes.__getitem__, range(40)), key=lambda e: len(e.support_texts))
    run.own_share(run.state(), {0: episodes[0]})
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, held + 2**26))
    try:
        run.own_share(run.state(), {1: episodes[-2], 2: episodes[-1]})
    except SettingsError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not plan_module.STATUS.exists(), reason="needs /proc")
def test_memory_that_is_full_in_fact_is_told(tiny_model: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FULL), tiny_model]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.match(r"step 1: the memory of cpu is too small for episode 1 alone \(long, ", done.stdout), done.stderr
    assert "step 1: 2 tasks together are too much for the memory: halved" in done.stderr
