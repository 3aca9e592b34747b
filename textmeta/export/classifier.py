"""A classifier that predicts by a graph of ONNX."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import onnxruntime
import torch
from pydantic import Field
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from textmeta.data.labels import label_array, one_of, read_labels, whole_number
from textmeta.encoder.encoder import OVERHEAD, EncoderSettings, TextTokenizer
from textmeta.encoder.token_states import length_buckets
from textmeta.errors import AdapterError
from textmeta.files import at_home
from textmeta.predicting import PredictsTexts
from textmeta.sharing.folder import ONNX, read_folder
from textmeta.sharing.store import read_model
from textmeta.sharing.support import Strict

FORMAT = 1  # of the folder
GRAPH, TOKENIZER = "model.onnx", "tokenizer.json"
SPECIAL = ("unk_token", "bos_token", "eos_token")  # by which texts that the tokenizer does not know are told


class NotExportedError(AdapterError, AttributeError):
    """A classifier as ONNX was asked for more than predictions."""


class _Meta(Strict):
    """The content of ``onnx.json``."""

    format_version: Literal[1]  # FORMAT
    versions: dict[str, str]
    labels: Annotated[list[Any], Field(min_length=2)]
    encoder: EncoderSettings
    prompt: str
    special_tokens: dict[Literal["unk_token", "bos_token", "eos_token"], str]
    int8: bool


class OnnxClassifier(PredictsTexts, TextTokenizer):
    """A classifier that :meth:`~textmeta.FewShotClassifier.export_onnx` wrote: it predicts, and does no more.

    Settings are those of :class:`~textmeta.FewShotClassifier`, and ``threads`` that the graph is run on, by default as
    many as PyTorch has. AdapterError if the folder holds none, is damaged, or its graph cannot be run.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        batch_size: int = 512,
        errors: Literal["raise", "replace"] = "raise",
        progress: bool = True,
    ) -> None:
        self.folder = folder = Path(at_home(folder))
        self.threads = None if threads is None else whole_number("threads", threads, 1)
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self.errors, self.progress = one_of("errors", errors, ("raise", "replace")), progress
        if not (folder / ONNX).is_file():
            raise AdapterError(f"{folder} is no classifier that export_onnx wrote: it has no {ONNX}")
        files = read_folder(folder, {GRAPH, TOKENIZER, ONNX})
        meta = read_model(_Meta, files[ONNX], folder / ONNX)
        self.classes = read_labels(meta.labels, folder / ONNX)
        self.classes_ = label_array(self.classes)
        try:
            read = Tokenizer.from_str(files[TOKENIZER].decode())
            self.session = open_session(files[GRAPH], self.threads)
        except Exception as error:  # the libraries raise anything
            raise AdapterError(f"{folder}: its graph or tokenizer cannot be loaded: {error}") from error
        self.inputs = {given.name for given in self.session.get_inputs()}
        tokenizer: Any = PreTrainedTokenizerFast
        super().__init__(meta.encoder, tokenizer(tokenizer_object=read, **meta.special_tokens), meta.prompt)

    def _answerer(self) -> tuple[Any, Callable[[list[str]], Any]]:
        return self, self._answers

    def _answers(self, texts: list[str]) -> Any:
        """Return the logits (1, n, C) of n texts, and their scope (1, n), None where the graph has no rule."""
        order, parts = [], []
        for numbers, ids, mask, place in text_batches(self.tokenize(texts or [""])):
            rows = {"input_ids": ids, "attention_mask": mask, "text": place}
            parts.append(self.session.run(None, {name: rows[name] for name in self.inputs}))
            order += numbers
        rank = np.argsort(order)[: len(texts)]
        found = [torch.from_numpy(np.concatenate(part)[rank])[None] for part in zip(*parts, strict=True)]
        return SimpleNamespace(logits=found[0], scope=found[1] if len(found) > 1 else None)

    def __getattr__(self, name: str) -> Any:
        raise NotExportedError(f"{name}: a classifier as ONNX predicts, and does no more: take the one it was made of")

    def __reduce__(self) -> Any:
        given = {name: getattr(self, name) for name in ("threads", "batch_size", "errors", "progress")}
        return partial(OnnxClassifier, **given), (self.folder,)


def open_session(graph: bytes, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Return what runs a graph on the CPU, by default on as many threads as PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def text_batches(
    windows: Sequence[Sequence[Sequence[int]]],
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, np.ndarray]]:
    """Yield texts of similar length: their numbers, then ids and mask (rows, length), and each row's place among them.

    Of each text ``windows`` has the token ids: one row, or several.
    """
    for numbers in length_buckets([sum(map(len, own)) for own in windows], OVERHEAD):
        rows = [(place, ids) for place, number in enumerate(numbers) for ids in windows[number]]
        ids = np.zeros((len(rows), max(len(own) for _, own in rows)), np.int64)
        mask = np.zeros_like(ids)
        for row, (_, own) in enumerate(rows):
            ids[row, : len(own)], mask[row, : len(own)] = own, 1
        yield numbers, ids, mask, np.array([place for place, _ in rows])
