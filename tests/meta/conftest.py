import logging
from functools import partial

import pytest

from tests.given import Logged, Patch
from tests.meta.runs import SHORT, Train, set_constants, train_on
from textmeta.data.corpus import Corpus
from textmeta.meta import outer_loop


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: Patch, caplog: Logged) -> None:
    caplog.set_level(logging.WARNING, "textmeta")  # which a test of the command may have changed: no plan
    set_constants(monkeypatch, **SHORT)
    monkeypatch.setattr(outer_loop, "draw_curves", lambda record: None)  # takes time


@pytest.fixture(scope="session")
def train(tiny_model: str, corpus: Corpus) -> Train:
    """Train the tiny encoder on the toy corpus: ``train_on`` with what remains to be given."""
    return partial(train_on, tiny_model, corpus)
