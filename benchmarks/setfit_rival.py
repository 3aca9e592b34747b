"""SetFit by its defaults, on the same encoder and episodes; needs the extra bench."""

import copy
import logging
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache

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

SEED = 0  # of its pairs and batches
SILENT = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "show_progress_bar": False}


@cache
def _encoder(max_length: int, device: str) -> SentenceTransformer:
    """Return the encoder: mean over the tokens, length 1."""
    words = Transformer(encoder_folder(), max_seq_length=max_length)
    pooling = Pooling(words.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[words, pooling, Normalize()], device=device)


def setfit_answers(episodes: Sequence[Episode], max_length: int, device: str = "cpu") -> list[np.ndarray]:
    """Return the class probabilities of each episode's queries."""
    models = (setfit_model(e.support_texts, e.support_labels, max_length, device) for e in episodes)
    answers = zip(models, episodes, strict=True)
    return [m.predict_proba(list(e.query_texts), as_numpy=True, show_progress_bar=False) for m, e in answers]


def setfit_model(texts: Sequence[str], labels: np.ndarray, max_length: int, device: str = "cpu") -> SetFitModel:
    """Return a model that is fitted to labelled texts."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    for name in ("setfit", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = datasets.Dataset.from_dict({"text": texts, "label": labels.tolist()})
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        model = SetFitModel(model_body=copy.deepcopy(_encoder(max_length, device)), model_head=LogisticRegression())
        trainer = Trainer(model, TrainingArguments(output_dir=folder, seed=SEED, **SILENT), train_dataset=rows)
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        trainer.train()
    return model
