"""Token states: what chosen layers of the encoder make of each token of a batch of texts, from one forward."""

import copy
import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from textmeta.encoder.encoder import OVERHEAD, Encoder
from textmeta.encoder.lora import using_factors
from textmeta.errors import EncoderError, SettingsError
from textmeta.processes import shared_out
from textmeta.progress import progress_bar

MAX_TOKENS = 2048  # of one forward, with padding: more of MiniLM do not stay in a core's cache
STATE_EPSILON = 1e-6  # the state of padding is 0

Batch = tuple[list[int], Tensor, Tensor]  # numbers of r rows, the rows (r, V, L, d) with zeros at padding, mask (r, L)
# of r texts: positions (r,), mask (r, L), states (r, L, d) by frozen layer; states, or ids, that enter the adapted ones
Entering = tuple[Tensor, Tensor, dict[int, Tensor], Tensor]


@dataclass(frozen=True)
class StateBatch:
    """The token states of r texts, or windows of texts, of similar length."""

    rows: Tensor  # (r,) int64, position of each text in the sequence of texts; several times that of one in windows
    states: Tensor  # (r, V, L, d), zeros at padding
    mask: Tensor  # (r, L) bool, True for tokens
    # (r, V, L) 1 / √(mean(h²) + 1e-6) of each token's state, which every pooling needs; made of the states by default
    inverse_rms: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.inverse_rms is None:
            object.__setattr__(self, "inverse_rms", (self.states.square().mean(-1) + STATE_EPSILON).rsqrt())


@dataclass(frozen=True)
class TokenStates:
    """The token states of a sequence of texts."""

    count: int  # of texts
    batches: tuple[StateBatch, ...]  # every text is in exactly one; of one read in windows, every window

    def unpadded(self) -> list[Tensor]:
        """Return the states (V, length, d) of texts that were not read in windows, in their order."""
        found: dict[int, Tensor] = {}
        for batch in self.batches:
            for row, states, length in zip(batch.rows.tolist(), batch.states, batch.mask.sum(1).tolist(), strict=True):
                found[row] = states[:, :length]
        return [found[row] for row in range(self.count)]

    def where(self, rows: Tensor) -> "TokenStates":
        """Return the states of the texts (m,) int64 at these positions, each named once; in that order."""
        position = torch.full((self.count,), -1, device=rows.device)
        position.index_copy_(0, rows, torch.arange(len(rows), device=rows.device))
        batches = []
        for batch in self.batches:
            own = position[batch.rows]
            kept = (own >= 0).nonzero()[:, 0]
            if len(kept) == len(own):
                batches.append(replace(batch, rows=own))
            elif len(kept):
                mask = batch.mask.index_select(0, kept)
                length = int(mask.sum(1).max())
                states, rms = (part.index_select(0, kept)[:, :, :length] for part in (batch.states, batch.inverse_rms))
                batches.append(StateBatch(own[kept], states, mask[:, :length], rms))
        return TokenStates(len(rows), tuple(batches))

    @classmethod
    def padded(cls, states: Sequence[Tensor], overhead: int = OVERHEAD) -> "TokenStates":
        """Return the states (V, length, d) of texts as padded batches, of so many tokens at most."""
        parts = _padded(states, overhead)
        return cls(len(states), tuple(StateBatch(torch.tensor(n, device=m.device), s, m) for n, s, m in parts))


class TokenStateReader:
    """Reads the token states of texts: the hidden states of chosen layers of an encoder, with or without LoRA.

    Layers are numbered as in transformers' ``hidden_states``, ascending: 0 is after the embeddings, ℓ after layer ℓ. By
    default they are the upper half and what enters it.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[int] | None = None) -> None:
        total = encoder.total_layers
        layers = range(total // 2, total + 1) if layers is None else layers
        if not layers or list(layers) != sorted(set(layers) & set(range(total + 1))):
            raise SettingsError(f"layers must be ascending numbers from 0 to {total}, given {list(layers)}")
        self.encoder, self.layers, self.views = encoder, tuple(layers), len(layers)
        frozen = encoder.frozen_layers
        self._adapted = frozen is None or self.layers[-1] > frozen  # whether a layer with LoRA is among them
        # What is taken of the frozen layers: those chosen, then the last where its states enter an adapted layer.
        self._lower: tuple[int, ...] = ()
        if frozen is not None:
            below = (layer for layer in self.layers if layer < frozen)
            self._lower = (*below, frozen) if self._adapted else self.layers
        self._kept: dict[str, Tensor] = {}  # text -> (len(self._lower), length, d)
        # the last factors and their versions; weights with them in it
        self._folded: tuple[list[tuple[int, int]], list[Tensor], dict[str, Tensor]] = [], [], {}

    def cache(self, *groups: Sequence[str], folder: Path | None = None, progress: bool = True) -> None:
        """Keep what the frozen layers make of texts, in half precision, for every later :meth:`read` of them.

        The processes of a run share the reading. The bits depend on the set of the texts of a group alone, and on how
        many processes there are, so that a resumed run has the same. In a folder each group is kept as a file, for
        other runs with this encoder, these layers and this length, and is read by one process. Of a model that cannot
        be split nothing is kept.
        """
        if self.encoder.frozen_layers is None:
            return
        distinct = [sorted(set(texts)) for texts in groups if texts]
        total = sum(map(len, distinct))
        with progress_bar(total, "frozen layers" if progress else None, "text", brief=True) as bar:
            for texts in distinct:
                if folder is None:  # by way of the CPU, for a tensor comes back to the device it was on
                    read = shared_out(lambda own: [state.cpu() for state in self.frozen_states(own, bar)], texts)
                    states = [state.to(self.encoder.device) for state in read]
                else:
                    states = self._stored_states(texts, folder, bar)
                self._kept.update(zip(texts, states, strict=True))

    @torch.no_grad()
    def frozen_states(self, texts: Sequence[str], bar: tqdm | None = None) -> list[Tensor]:
        """Return what frozen layers make of each text, (lower, length, d), halves but for an encoder in float64.

        Of one in windows all their states: whole windows first, so that every ``max_length`` a new one begins.
        EncoderError if there are no frozen layers.
        """
        if self.encoder.frozen_layers is None:
            raise EncoderError(f"{self.encoder.settings.model} cannot be split, so that its states cannot be kept")
        found: dict[int, list[Tensor]] = defaultdict(list)
        for numbers, ids, mask in self._id_batches(texts):
            layers = self.encoder.states(ids, mask, adapted=False)
            states = torch.stack([layers[layer] for layer in self._lower], 1)
            # an outlier must not become infinite
            coarse = states if states.dtype == torch.float64 else states.clamp(-65504, 65504).half()
            for number, state, length in zip(numbers, coarse, mask.sum(1).tolist(), strict=True):
                found[number].append(state[:, :length].clone())  # a view would keep the whole batch
            if bar is not None:
                bar.update(len(set(numbers)))
        return [torch.cat(sorted(found.pop(n), key=lambda s: -s.shape[1]), 1) for n in range(len(texts))]

    def having(self, states: Mapping[str, Tensor]) -> "TokenStateReader":
        """Return a reader that has these :meth:`frozen_states` of texts; EncoderError if they are of another shape."""
        layers, size = len(self._lower), self.encoder.hidden_size
        for state in states.values():
            if not layers or (state.shape[0], state.shape[2]) != (layers, size):
                raise EncoderError(f"token states are {tuple(state.shape)}, expected {layers, 'length', size}")
        reader = copy.copy(self)
        reader._kept = {**self._kept, **states}
        return reader

    def _stored_states(self, texts: Sequence[str], folder: Path, bar: tqdm) -> list[Tensor]:
        """Return the states (lower, length, d) of each text, by way of a file."""
        encoder = self.encoder
        # all that the states depend on
        told = [encoder.weights_sha256, encoder.settings.max_length, encoder.precision, self._lower]
        told += ["window"] * (encoder.settings.long_texts == "window") + [encoder.prompt] * bool(encoder.prompt)
        path = folder / f"{hashlib.sha256(json.dumps([*told, *texts]).encode()).hexdigest()[:32]}.safetensors"
        if path.exists():
            bar.update(len(texts))
        else:
            states = self.frozen_states(texts, bar)
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            lengths = torch.tensor([state.shape[1] for state in states])
            save_file({"states": torch.cat(states, 1).contiguous(), "lengths": lengths}, temporary)
            os.replace(temporary, path)
        stored = load_file(path)  # mapped into memory, read when it is used
        return list(torch.split(stored["states"], stored["lengths"].tolist(), 1))

    def entering(self, texts: Sequence[str]) -> Iterator[Entering]:
        """Yield what enters the adapted layers, in batches on the device; what is kept of a text is not made again."""
        encoder, frozen = self.encoder, self.encoder.frozen_layers
        kept = [number for number, text in enumerate(texts) if text in self._kept]
        fresh = [number for number, text in enumerate(texts) if text not in self._kept]
        split = [torch.split(self._kept[texts[number]], encoder.settings.max_length, 1) for number in kept]
        windows = [number for number, own in zip(kept, split, strict=True) for _ in own]
        stored = _padded(list(itertools.chain(*split)), encoder.overhead, device=encoder.device)
        parts = ((windows, stored), (fresh, self._id_batches([texts[number] for number in fresh])))
        for own, (numbers, given, mask) in ((own, batch) for own, part in parts for batch in part):
            rows = torch.tensor([own[number] for number in numbers], device=encoder.device)
            if given.is_floating_point():  # what the frozen layers made of the texts
                lower = given.to(torch.promote_types(given.dtype, torch.float32)).unbind(1)
                yield rows, mask, dict(zip(self._lower, lower, strict=True)), lower[-1]
            elif frozen is not None:
                lower = encoder.states(given, mask, adapted=False)
                yield rows, mask, dict(enumerate(lower)), lower[frozen]
            else:
                yield rows, mask, {}, given

    def read(
        self,
        texts: Sequence[str],
        factors: Mapping[str, Tensor] | None = None,
        row_task: Tensor | None = None,
        entered: Sequence[Entering] | None = None,
    ) -> TokenStates:
        """Return the token states of n texts, at least float32, by LoRA's factors; without LoRA where left out.

        These are (out, in), or (tasks, out, in) for one a task; then ``row_task`` (n,) int64 is the task of each text.
        The states are differentiable in them where gradients are enabled and a factor requires one. ``entered`` is what
        :meth:`entering` made of the texts, where they are read several times.
        """
        encoder, frozen = self.encoder, self.encoder.frozen_layers
        differentiated = factors is not None and any(factor.requires_grad for factor in factors.values())
        folded: dict[str, Tensor] = {}
        if not differentiated and row_task is None:  # making the weights takes longer than reading a short text
            held = list((factors or {}).values())
            told = [(id(factor), factor._version) for factor in held]  # training changes factors in place
            kept = self._folded
            if kept[0] != told:
                self._folded = kept = told, held, {}  # as a whole: other threads may be reading
            folded = kept[2]
        batches: list[StateBatch] = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and differentiated):
            for rows, mask, lower, given in self.entering(texts) if entered is None else entered:
                found = dict(lower)
                if self._adapted:
                    task = None if row_task is None else row_task[rows]
                    with nullcontext() if factors is None else using_factors(factors, task, folded):
                        found |= zip(itertools.count(frozen or 0), encoder.states(given, mask, adapted=True))
                if encoder.first_token:
                    last = self.layers[-1]
                    found[last] = found[last][:, :1].expand_as(found[last])
                states = torch.stack([found[layer] for layer in self.layers], 1)
                batches.append(StateBatch(rows, states.masked_fill_(~mask[:, None, :, None], 0), mask))
        return TokenStates(len(texts), tuple(batches))

    def _id_batches(self, texts: Sequence[str]) -> Iterator[Batch]:
        """Return the token ids (r, L) of texts in batches, which are made one by one."""
        read = self.encoder.tokenize(texts) if texts else []
        windows = [(number, ids) for number, own in enumerate(read) for ids in own]
        rows = [torch.tensor(ids).view(1, -1, 1) for _, ids in windows]
        padded = _padded(rows, self.encoder.overhead, device=self.encoder.device)
        return (([windows[number][0] for number in numbers], ids[:, 0, :, 0], mask) for numbers, ids, mask in padded)


def _padded(rows: Sequence[Tensor], overhead: int, device: torch.device | None = None) -> Iterator[Batch]:
    """Yield rows (V, length, d) in batches of similar length, on a device, by default their own."""
    lengths = [row.shape[1] for row in rows]
    for numbers in length_buckets(lengths, overhead):
        longest = lengths[numbers[-1]]
        more = [(rows[number], longest - lengths[number]) for number in numbers]
        batch = torch.stack([pad(row, (0, 0, 0, short)) if short else row for row, short in more]).to(device)
        own = torch.tensor([lengths[number] for number in numbers], device=batch.device)
        yield numbers, batch, torch.arange(longest, device=batch.device) < own[:, None]


def length_buckets(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Group rows of so many tokens into lists of their numbers, so that little work goes into padding.

    A bucket is padded to its longest row, and costs ``rows x longest + overhead`` tokens. The sorted rows are split in
    the cheapest way there is (dynamic programming over the distinct lengths); then buckets of several rows and more
    than ``MAX_TOKENS``, with padding, are cut.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    # position in `order` after the last row of each distinct length
    ends = [i + 1 for i in range(len(order)) if i + 1 == len(order) or lengths[order[i]] != lengths[order[i + 1]]]
    best: dict[int, tuple[float, int]] = {0: (0.0, 0)}  # rows covered -> (cost, start of the last bucket)
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min((cost + (end - start) * longest + overhead, start) for start, (cost, _) in best.items())
    buckets: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        rows = end - start
        parts = -(-rows // max(1, MAX_TOKENS // lengths[order[end - 1]]))
        cuts = [start + rows * part // parts for part in range(parts + 1)]
        buckets = [order[one:other] for one, other in itertools.pairwise(cuts)] + buckets
        end = start
    return buckets
