"""SetFit, and sentence-transformers with logistic regression, on the same encoder; quiet, leaving nothing behind."""

import copy
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from textmeta.data.episodes import Episode
from textmeta.errors import TextMetaError
from textmeta.model.encoder import EncoderSettings
from textmeta.model.pretrained import load_pretrained

__all__ = ["LOGISTIC", "has_setfit", "sentence_encoder", "sentence_probabilities", "setfit_probabilities"]

LOGISTIC = {"max_iter": 1000}  # of sklearn's LogisticRegression, all else its defaults


def has_setfit() -> bool:
    """Whether the `bench` extra is installed."""
    return find_spec("setfit") is not None and find_spec("sentence_transformers") is not None


@cache
def sentence_encoder(settings: EncoderSettings, device: str = "cpu") -> Any:
    """Return textmeta's encoder as a SentenceTransformer: mean over the tokens, length 1, texts cut as everywhere."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - an extra
    from sentence_transformers.sentence_transformer import modules  # noqa: PLC0415

    if settings.pooling != "mean":
        raise TextMetaError(f"only mean pooling is written here, given {settings.pooling!r}")
    pretrained = load_pretrained(settings.model, settings.revision)
    with _quiet(seed=0), tempfile.TemporaryDirectory() as folder:
        pretrained.model.save_pretrained(folder)
        pretrained.tokenizer.save_pretrained(folder)
        words = modules.Transformer(folder, max_seq_length=settings.max_length)
        pooling = modules.Pooling(pretrained.model.config.hidden_size, "mean")
        return SentenceTransformer(modules=[words, pooling, modules.Normalize()], device=device)


def sentence_probabilities(
    settings: EncoderSettings, episodes: Sequence[Episode], device: str = "cpu"
) -> list[np.ndarray]:
    """Return class probabilities as people get them: encode, then logistic regression."""
    encoder, found = sentence_encoder(settings, device), []
    for episode in episodes:
        head = LogisticRegression(**LOGISTIC)
        head.fit(encoder.encode(list(episode.support_texts), show_progress_bar=False), episode.support_labels)
        found.append(head.predict_proba(encoder.encode(list(episode.query_texts), show_progress_bar=False)))
    return found


def setfit_probabilities(
    settings: EncoderSettings, episodes: Sequence[Episode], seed: int, device: str = "cpu"
) -> tuple[list[np.ndarray], float]:
    """Return SetFit's class probabilities, by its own defaults, and the mean seconds of a fit."""
    encoder, found, seconds = sentence_encoder(settings, device), [], 0.0
    for episode in tqdm(episodes, desc="setfit", unit="episode", leave=False):
        with _quiet(seed):
            start = time.monotonic()
            model = _fit(copy.deepcopy(encoder), episode, seed)
            seconds += time.monotonic() - start
            found.append(model.predict_proba(list(episode.query_texts), as_numpy=True, show_progress_bar=False))
    return found, seconds / len(episodes)


def _fit(body: Any, episode: Episode, seed: int) -> Any:
    from setfit import SetFitModel, Trainer, TrainingArguments  # noqa: PLC0415 - an extra

    model = SetFitModel(model_body=body, model_head=LogisticRegression())
    rows = {"text": list(episode.support_texts), "label": episode.support_labels.tolist()}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=str(Path(folder)),
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            show_progress_bar=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows))
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        trainer.train()
    return model


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Let libraries draw from the global random states, and print, without anyone noticing."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - SetFit sets it
    bars, verbosity = datasets.are_progress_bars_disabled(), transformers.logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("setfit", "sentence_transformers")]
    levels = [logger.level for logger in loggers]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory'", UserWarning)
        torch.manual_seed(seed)
        datasets.disable_progress_bars()
        transformers.logging.set_verbosity_error()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            transformers.logging.set_verbosity(verbosity)
            if not bars:
                datasets.enable_progress_bars()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
