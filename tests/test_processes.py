"""Several processes train what one does, and end when one of them is lost."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file, save_file

from tests.conftest import WORDS, write_rows
from tests.given import Patch, adapter_of, doubled
from tests.meta.runs import LEARNER, SHORT, on_each_step, rows_of, set_constants, train_on
from textmeta import Adapter, Corpus, processes
from textmeta.encoder.encoder import Encoder
from textmeta.errors import SettingsError, TextMetaError
from textmeta.files import CHECKPOINT
from textmeta.meta import trainer
from textmeta.sharing.store import load_adapter

ROOT = Path(__file__).parents[1]


def encoder64(*given: Any, **named: Any) -> Encoder:
    return doubled(Encoder(*given, **named))


@pytest.fixture
def together(
    tiny_model: str, corpus: Corpus, tmp_path: Path, monkeypatch: Patch
) -> Callable[..., list[tuple[int, str]]]:
    """Train in float64 by so many processes of gloo; return the exit code of each and the error that it raised.

    Each is told its number, and sets what it likes, before it begins; it leaves its tensors as NUMBER.safetensors.
    """
    # names of words that the encoder knows: a gradient that is 0 but for rounding becomes more in Adam
    names = [" ".join(WORDS[12 * label : 12 * label + 2]) for label in range(len(corpus.class_names))]
    corpus = Corpus.from_pairs("toy", corpus.texts, [names[label] for label in corpus.labels])
    learned = adapter_of(tiny_model, layers=LEARNER.layers, steps=2).initialisation.tensors()
    start = {name: value.double() for name, value in learned.items()}
    set_constants(monkeypatch, **{**SHORT, "CALIBRATION_EPISODES": 10, "VALIDATION_EPISODES": 9})

    def one(number: int, folder: Path, begin: Callable[[int], None], settings: Mapping[str, Any]) -> None:
        for state in (PartialState, AcceleratorState, GradientState):  # as in a process that has just started
            state._shared_state.clear()
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
        torch.set_default_dtype(torch.float64)
        trainer.Encoder = encoder64  # type: ignore[attr-defined,misc]
        begin(number)
        try:
            made: Adapter = train_on(tiny_model, corpus, folder, valid=3, start=start, **settings)
        except TextMetaError as error:
            (folder.parent / f"{number}.txt").write_text(f"{type(error).__name__}: {error}")
            os._exit(2)
        save_file({**made.initialisation.tensors(), "scope": made.scope}, folder.parent / f"{number}.safetensors")
        os._exit(0)

    def run(count: int, begin: Callable[[int], None] = lambda number: None, **settings: Any) -> list[tuple[int, str]]:
        folder = tmp_path / f"by-{count}" / "run"
        folder.parent.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        for name, value in launcher.items():  # what torchrun sets; accelerate warns where the last is not set
            monkeypatch.setenv(name, value)
        given = {"episodes": 5, "tasks_per_step": 3, **settings}
        fork = multiprocessing.get_context("fork").Process
        started = [fork(target=one, args=(number, folder, begin, given)) for number in range(count)]
        for process in started:
            process.start()
        for process in started:
            process.join(60 if process is started[0] else 5)
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
        told = [folder.parent / f"{number}.txt" for number in range(count)]
        return [(code, path.read_text() if path.exists() else "") for code, path in zip(codes, told, strict=True)]

    return run


def test_processes_train_what_one_does(together: Any, tmp_path: Path) -> None:
    """Two steps, of which the second has two tasks; the reading, the validation and the scope rule are shared, too."""
    found = {}
    for count in (1, 2, 3):
        assert together(count) == [(0, "")] * count
        folder = tmp_path / f"by-{count}"
        found[count] = [load_file(folder / f"{number}.safetensors") for number in range(count)]
        found[count].append(load_file(folder / "run" / CHECKPOINT))  # with the moments of Adam
        assert rows_of(folder / "run") == rows_of(tmp_path / "by-1" / "run")
    assert found[1][0]["queries"].dtype == torch.float64
    for count in (2, 3):
        for number, tensors in enumerate(found[count]):
            alone = found[1][-1 if number == count else 0]
            torch.testing.assert_close(tensors, alone, rtol=0, atol=1e-12)


HANGING = pytest.param(signal.SIGSTOP, id="hanging", marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, id="killed"), HANGING])
def test_a_lost_process_ends_the_others(number: int, together: Any, monkeypatch: Patch) -> None:
    """Also one that was told to stop, and finishes its step before."""
    monkeypatch.setattr(processes, "LONGEST_WAIT", timedelta(seconds=3 if number == signal.SIGSTOP else 600))

    def begin(rank: int) -> None:
        def act(begun: int, _: Mapping[str, torch.Tensor]) -> None:
            if begun == 1:
                os.kill(os.getpid(), number if rank else signal.SIGTERM)

        on_each_step(monkeypatch, "maml", act)

    (code, told), (lost, _) = together(2, begin, episodes=8, tasks_per_step=2)
    assert (code, lost) == (2, -9 if number == signal.SIGKILL else None)
    assert told.startswith("LostProcessError: lost another process of this run, which has ended or hangs")


def test_more_processes_than_tasks_are_refused(together: Any) -> None:
    told = "SettingsError: tasks_per_step is 1, too few for 2 processes"
    (code, first), (other, second) = together(2, tasks_per_step=1)
    assert (code, other) == (2, 2)
    assert any(said.startswith(told) for said in (first, second)), "the other may lose the one that said it"


def test_processes_that_see_different_folders_are_refused(together: Any, tmp_path: Path) -> None:
    assert together(2) == [(0, "")] * 2

    def begin(rank: int) -> None:
        trainer.at_home = lambda path: tmp_path / f"of-{rank}" if rank else path  # type: ignore[attr-defined]

    for code, told in together(2, begin):
        assert code == 2
        assert re.match(r"SettingsError: processes would go on from different steps \(\[0, 2\]\)", told)


def test_one_of_several_that_would_train_alone_is_refused(tiny_model: str, corpus: Corpus, monkeypatch: Patch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="WORLD_SIZE is 2, but this process would train alone"):
        train_on(tiny_model, corpus)


def launched(output: Path, tiny_model: str, corpus: Corpus, *more: str) -> subprocess.Popen[str]:
    """Start ``textmeta train`` by accelerate, as recipes/accelerate/cpu2.yaml says."""
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    config = ["--config_file", str(ROOT / "recipes/accelerate/cpu2.yaml")]
    data = write_rows(output.parent / "toy.jsonl", corpus)
    given = ["--data", str(data), "--encoder.model", tiny_model, "--encoder.max_length", "32", "--test_shots", "[1]"]
    command = [sys.executable, *launch, *config, "-m", "textmeta", "train", "--output", str(output), *given, *more]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    how = {"env": {**environment, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}, "text": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)  # type: ignore[call-overload,no-any-return]


@pytest.mark.slow
def test_accelerate_trains_on_the_cpus_of_a_machine(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", tiny_model, corpus, "--episodes", "4", "--test_episodes", "9")
    shown, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert shown.count("this adapter") == 2  # with and without names, told by one process
    made, _ = load_adapter(tmp_path / "run")
    assert [result["frozen"]["episodes"] for result in made.record["results"].values()] == [9, 9]


@pytest.mark.slow
def test_a_killed_process_ends_the_launcher_within_a_minute(tiny_model: str, corpus: Corpus, tmp_path: Path) -> None:
    run = launched(tmp_path / "run", tiny_model, corpus, "--episodes", "100000")
    record = tmp_path / "run" / "record.jsonl"
    while run.poll() is None and not (record.exists() and record.read_text()):
        time.sleep(0.1)
    first, second = psutil.Process(run.pid).children()
    second.kill()
    said = run.communicate(timeout=60)[1]
    assert run.returncode
    assert not first.is_running()
    assert "textmeta: lost another process of this run, which has ended or hangs" in said
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9", said)


@pytest.mark.parametrize("name", ["cpu2", "gpu1", "gpu8", "gpu8x8"])
def test_accelerate_reads_the_configs(name: str) -> None:
    config = load_config_from_file(str(ROOT / f"recipes/accelerate/{name}.yaml"))
    expected = {"cpu2": (1, 2), "gpu1": (1, 1), "gpu8": (1, 8), "gpu8x8": (8, 64)}[name]
    assert (config.num_machines, config.num_processes) == expected
