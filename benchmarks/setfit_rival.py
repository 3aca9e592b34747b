"""SetFit by its defaults, on the same encoder and episodes; needs the extra bench."""

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from baselines import encoder_folder
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.linear_model import LogisticRegression

from textmeta.data.episodes import Episode

__all__ = ["setfit_answers"]

SEED = 0  # of its pairs and batches


@cache
def _encoder(max_length: int, device: str) -> SentenceTransformer:
    """Return the encoder: mean over the tokens, length 1."""
    words = Transformer(encoder_folder(), max_seq_length=max_length)
    pooling = Pooling(words.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[words, pooling, Normalize()], device=device)


def setfit_answers(episodes: Sequence[Episode], max_length: int, device: str = "cpu") -> list[np.ndarray]:
    """Return the class probabilities of each episode's queries."""
    with _quiet():
        encoder, answers = _encoder(max_length, device), []
        for episode in episodes:
            torch.manual_seed(SEED)
            model = _fit(copy.deepcopy(encoder), episode)
            answers.append(model.predict_proba(list(episode.query_texts), as_numpy=True, show_progress_bar=False))
    return answers


def _fit(body: SentenceTransformer, episode: Episode) -> Any:
    model = SetFitModel(model_body=body, model_head=LogisticRegression())
    rows = {"text": list(episode.support_texts), "label": episode.support_labels.tolist()}
    with tempfile.TemporaryDirectory() as folder:
        # all that decides what is learned is the default
        silent = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "show_progress_bar": False}
        settings = TrainingArguments(output_dir=folder, seed=SEED, **silent)
        trainer = Trainer(model=model, args=settings, train_dataset=datasets.Dataset.from_dict(rows))
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        trainer.train()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Let the libraries say nothing."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    for name in ("setfit", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
