"""What the frozen layers make of a corpus, kept on the disk, so that a rerun need not compute it again."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from textmeta.data.corpus import Corpus
from textmeta.meta.adaptation import start_parameters
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import lora_factors

__all__ = ["DiskCache"]

AT_ONCE = 1024  # texts


class DiskCache:
    """Frozen features and states of corpora, one file each, named after all that they depend on.

    Args:
        folder: of the files.
        states_mb: states of a corpus that take more than so many MiB are not kept, but computed by every process anew.
    """

    def __init__(self, folder: Path, states_mb: int) -> None:
        self.folder = folder
        self.states_mb = states_mb
        self._features: dict[Path, Tensor] = {}
        self._warm: set[tuple[int, Path]] = set()

    def features(self, encoder: Encoder, corpus: Corpus) -> tuple[list[str], Tensor]:
        """Return the texts of a corpus, each once, and their features (n, hidden) without any LoRA."""
        texts = unique(corpus.texts)
        path = self._path(encoder, corpus, "features")
        if path not in self._features:
            if not path.exists():
                self.warm(encoder, corpus)
                _write(path, {"features": plain_features(encoder, texts)})
            self._features[path] = load_file(path)["features"]
        return texts, self._features[path]

    def warm(self, encoder: Encoder, corpus: Corpus) -> None:
        """Let an encoder have the states of the corpus's texts in its memory, from the disk or computed."""
        texts = unique(corpus.texts)
        path = self._path(encoder, corpus, f"states-{encoder.lora.layers or 'half'}")
        if (id(encoder), path) in self._warm:
            return
        if path.exists():
            content = load_file(path, str(encoder.device))
            states = list(torch.split(content["states"], content["lengths"].tolist()))
        else:
            chunks = [texts[first : first + AT_ONCE] for first in range(0, len(texts), AT_ONCE)]
            bar = tqdm(chunks, desc=f"frozen layers, {corpus.name}", unit=f"{AT_ONCE} texts", leave=False)
            states = [state for chunk in bar for state in encoder.states(chunk)]
            if sum(state.nbytes for state in states) <= self.states_mb * 2**20:
                lengths = torch.tensor([len(state) for state in states])
                _write(path, {"states": torch.cat(states), "lengths": lengths})
        encoder.keep_states(texts, states)
        self._warm.add((id(encoder), path))

    def _path(self, encoder: Encoder, corpus: Corpus, kind: str) -> Path:
        settings = encoder.settings
        encoder_name = f"{encoder.weights_sha256[:12]}-{settings.pooling}-{settings.max_length}-{encoder.device.type}"
        return self.folder / f"{corpus.name}-{corpus.sha256[:12]}-{encoder_name}-{kind}.safetensors"


def plain_features(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Return the features (n, hidden) of texts without any LoRA, many texts in a forward."""
    start = start_parameters(encoder.factor_shapes, InnerLoopSettings(steps=0), encoder.hidden_size)
    factors = {name: value.to(encoder.device) for name, value in lora_factors(start).items()}
    with torch.no_grad():
        chunks = [texts[first : first + AT_ONCE] for first in range(0, len(texts), AT_ONCE)]
        return torch.cat([encoder.features(encoder.prepare(chunk), factors).cpu() for chunk in chunks])


def unique(texts: Sequence[str]) -> list[str]:
    """Return each text once, in the order of the first."""
    return list(dict.fromkeys(texts))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    save_file(tensors, temporary)
    os.replace(temporary, path)
