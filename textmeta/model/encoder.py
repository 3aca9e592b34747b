"""The encoder: a frozen transformer whose upper layers carry LoRA.

The layers below the lowest LoRA do not depend on anything that is learned, so their states are computed once per text
and cached. The rest, the adapted suffix, runs for any factors, of one task or of many at once.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from textmeta.errors import SettingsError
from textmeta.files import is_folder
from textmeta.hub import HubAccess
from textmeta.model.attention import is_twice_differentiable, twice_differentiable, use_switched_attention
from textmeta.model.lora import LoraSettings, inject, lora_config, using_factors
from textmeta.model.padding import length_buckets
from textmeta.model.pretrained import DEFAULT_ENCODER, load_pretrained, weights_digest
from textmeta.model.splitting import find_layers, split_model
from textmeta.model.text_cache import TextCache

__all__ = ["Encoder", "EncoderSettings", "PreparedTexts"]

MAX_ROWS = 256  # rows of one forward of the suffix
CHECKPOINT_ROWS = 1024  # from here on, activations are computed again in the backward pass instead of kept


@dataclass(frozen=True)
class EncoderSettings:
    """Which encoder, and how a text becomes one vector.

    Args:
        model: folder, or id on the Hub, of any transformers text encoder.
        revision: branch, tag or commit on the Hub.
        pooling: mean over the tokens, or the first token (cls).
        max_length: texts are cut after this many tokens.
        cache_mb: memory limit of the cached states of the frozen layers, in MiB; 0 turns the cache off.
    """

    model: str = DEFAULT_ENCODER
    revision: str | None = None
    pooling: Literal["mean", "cls"] = "mean"
    max_length: int = 128
    cache_mb: int = 2048

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.pooling not in ("mean", "cls"):
            raise SettingsError(f"pooling must be 'mean' or 'cls', given {self.pooling!r}")
        if self.max_length < 3:
            raise SettingsError(f"max_length must be at least 3 tokens, given {self.max_length}")
        if self.cache_mb < 0:
            raise SettingsError(f"cache_mb must not be negative, given {self.cache_mb}")


@dataclass(frozen=True)
class Bucket:
    """Rows of similar length, padded: states (rows, length, hidden) or token ids (rows, length)."""

    rows: Tensor  # (rows,) position in the sequence of texts
    inputs: Tensor
    mask: Tensor  # (rows, length) int64, 1 for tokens


@dataclass(frozen=True)
class PreparedTexts:
    """Texts ready for the adapted suffix; prepared once, used in every inner step."""

    texts: tuple[str, ...]
    buckets: tuple[Bucket, ...]

    @property
    def count(self) -> int:
        """Number of texts."""
        return len(self.texts)

    def where(self, kept: Tensor) -> "PreparedTexts":
        """Return those of the texts that are kept (n,) bool, in their order."""
        position = kept.cumsum(0) - 1
        buckets = []
        for bucket in self.buckets:
            own = kept[bucket.rows]
            if own.any():
                length = int(bucket.mask[own].sum(1).max())
                inputs, mask = bucket.inputs[own][:, :length], bucket.mask[own][:, :length]
                buckets.append(Bucket(position[bucket.rows[own]], inputs, mask))
        return PreparedTexts(tuple(itertools.compress(self.texts, kept.tolist())), tuple(buckets))


class Encoder:
    """A frozen transformer with LoRA on its upper layers.

    Args:
        settings: which encoder, pooling, length, cache.
        lora: of the adapter.
        device: where it runs; by default the CPU.
        precision: "bf16" runs the transformer's matrix products in bfloat16 (autocast); weights, LoRA factors, their
            gradients, pooling and features stay float32. fp16 would need its gradients scaled in every inner step, and
            is refused.

    Attributes:
        factor_shapes: shape of each LoRA factor by name.
        peft_config: PEFT's configuration of the adapter.
        hidden_size: length of a feature vector.
        total_layers: of the transformer.
        frozen_layers: how many lie below the lowest LoRA; None where the model cannot be split there.
        overhead: what one more forward costs, in tokens of another: launches on a GPU cost more.

    Raises:
        EncoderError: if the model cannot be loaded or has no layers that can carry the adapter.
    """

    def __init__(
        self,
        settings: EncoderSettings | None = None,
        lora: LoraSettings | None = None,
        device: str | torch.device = "cpu",
        precision: str = "no",
        access: HubAccess | None = None,
    ) -> None:
        if precision not in ("no", "bf16"):
            raise SettingsError(
                f"precision must be 'no' or 'bf16', given {precision!r}"
                + (": the inner loop's gradients vanish in half precision; bf16 has the range" * (precision == "fp16"))
            )
        settings = settings or EncoderSettings()
        if is_folder(settings.model):  # a relative path would look like an id on the Hub from elsewhere
            settings = replace(settings, model=str(Path(settings.model).resolve()))
        self.settings = settings
        self.lora = lora or LoraSettings()
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise SettingsError(f"no such device: {device!r}; expected 'cpu', 'cuda', 'cuda:1', 'mps' …") from error
        self.precision = precision
        self.access = access
        pretrained = load_pretrained(self.settings.model, self.settings.revision, access)
        model, self.tokenizer, self.commit = pretrained.model, pretrained.tokenizer, pretrained.commit
        self.source = (settings.model, self.commit or settings.revision)  # where another copy can be had
        use_switched_attention(model)
        _check_length(model, self.settings)
        self.weights_sha256 = weights_digest(model)
        layers_name = find_layers(model)
        self.total_layers = total = len(model.get_submodule(layers_name))  # type: ignore[arg-type]
        first = total - self.lora.layer_count(total)
        self.peft_config = lora_config(model, layers_name, first, self.lora)
        self.factor_shapes = inject(model, self.peft_config)
        self.hidden_size: int = model.config.hidden_size
        model.to(self.device)  # type: ignore[arg-type]
        self._prefix, self._suffix = split_model(model, layers_name, first)
        self.frozen_layers = None if self._prefix is None else first
        self.overhead = 128 if self.device.type == "cpu" else 4096
        # A text's states must not depend, to the bit, on which texts it came with, or a resumed run would differ from
        # an uninterrupted one. Matrix products round differently in batches of different shapes, on a CPU even in
        # different rows: so there each text goes alone. A GPU is too slow at that: it gets batches of one fixed shape.
        self._group = 1 if self.device.type == "cpu" else 32
        features_mb = self.settings.cache_mb // 16  # a vector a text, where the states have one for each token
        self._states_cache = TextCache(self.settings.cache_mb - features_mb)
        self._frozen_cache = TextCache(features_mb)

    def prepare(self, texts: Sequence[str], *, remember: bool = True) -> PreparedTexts:
        """Run the frozen layers on texts (or take their states from the cache) and pad them into buckets.

        Args:
            texts: to prepare.
            remember: whether to cache their states, for texts that will come again.
        """
        states = self._states(texts, remember)
        buckets = []
        for rows in length_buckets([len(state) for state in states], self.overhead, MAX_ROWS):
            inputs = pad_sequence([states[row] for row in rows], batch_first=True)
            lengths = torch.tensor([len(states[row]) for row in rows], device=self.device)
            mask = (torch.arange(inputs.shape[1], device=self.device) < lengths[:, None]).long()
            buckets.append(Bucket(torch.tensor(rows, device=self.device), inputs, mask))
        return PreparedTexts(tuple(texts), tuple(buckets))

    def features(self, texts: PreparedTexts, factors: Mapping[str, Tensor], row_task: Tensor | None = None) -> Tensor:
        """Return the adapted features of texts: pooled, of length 1, at least float32.

        Args:
            texts: n prepared texts.
            factors: every LoRA factor, (out, in) or (tasks, out, in).
            row_task: (n,) int64, task of each text, where a factor has a task dimension.

        Returns:
            (n, hidden) features, differentiable in the factors (a large batch is checkpointed).
        """
        names, tensors = list(factors), list(factors.values())
        save_memory = texts.count > CHECKPOINT_ROWS and torch.is_grad_enabled()
        twice = is_twice_differentiable()

        def run(task: Tensor | None, inputs: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
            # set inside, so that a checkpointed forward run again in the backward pass is the same computation
            with using_factors(dict(zip(names, weights, strict=True)), task), twice_differentiable(twice):
                return self._pool(self._run_suffix(inputs, mask), mask)

        parts = []
        for bucket in texts.buckets:
            task = None if row_task is None else row_task[bucket.rows]
            arguments = (bucket.inputs, bucket.mask, *tensors)
            if save_memory:
                parts.append(checkpoint(run, task, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(run(task, *arguments))
        order = torch.cat([bucket.rows for bucket in texts.buckets])
        features: Tensor = torch.cat(parts).index_select(0, torch.argsort(order))
        return features

    def frozen_features(self, texts: Sequence[str], *, remember: bool = True) -> Tensor:
        """Return the features (n, hidden) of texts without any LoRA; computed once per text, then cached.

        Args:
            texts: n texts.
            remember: whether to cache them.
        """

        def compute(missing: list[str]) -> list[Tensor]:
            # outside of using_factors LoRA's B is 0
            hidden = self._in_equal_batches(self._states(missing, remember), self._run_whole)
            return [self._pool(row[None], torch.ones_like(row[None, :, 0]))[0] for row in hidden]

        return torch.stack(self._frozen_cache.get(texts, compute, remember))

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """Return what the frozen layers make of texts, to be kept elsewhere and given back to :meth:`keep_states`."""
        return self._states(texts, remember=False)

    def keep_states(self, texts: Sequence[str], states: Sequence[Tensor]) -> None:
        """Put into the cache what :meth:`states` returned, here or in another process with the same settings."""
        given = dict(zip(texts, states, strict=True))
        self._states_cache.get(texts, lambda missing: [given[text] for text in missing])

    @torch.no_grad()
    def lower_states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the states after 0, 1 … ``frozen_layers`` layers, of a model that is split.

        Args:
            ids: (rows, length) token ids.
            mask: (rows, length) int64, 1 for tokens.
        """
        assert self._prefix is not None, "the model is not split"
        return self._all_states(self._prefix, input_ids=ids, attention_mask=mask)

    def upper_states(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs and the states after each adapted layer, with the LoRA factors in use.

        Args:
            inputs: the last of :meth:`lower_states`; token ids where the model is not split, for the states of all
                layers.
            mask: (rows, length) int64, 1 for tokens.
        """
        key = "input_ids" if self._prefix is None else "inputs_embeds"
        return self._all_states(self._suffix, **{key: inputs, "attention_mask": mask})

    def _all_states(self, half: nn.Module, **inputs: Tensor) -> tuple[Tensor, ...]:
        with self._autocast():
            output = half(**inputs, output_hidden_states=True)
        # some families report nothing where there is no layer: then the last states are the embeddings
        return tuple(output.hidden_states) or (output.last_hidden_state,)

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.settings.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.to(hidden.dtype)
            pooled = torch.einsum("nld,nl->nd", hidden, weights) / weights.sum(1, keepdim=True)
        return nn.functional.normalize(pooled, dim=1)

    def _run_whole(self, inputs: Tensor) -> Tensor:
        """Run the suffix on rows without padding."""
        return self._run_suffix(inputs, torch.ones(inputs.shape[:2], dtype=torch.long, device=self.device))

    def _run_suffix(self, inputs: Tensor, mask: Tensor) -> Tensor:
        key = "input_ids" if self._prefix is None else "inputs_embeds"
        with self._autocast():
            hidden: Tensor = self._suffix(**{key: inputs, "attention_mask": mask}).last_hidden_state
        return hidden

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _states(self, texts: Sequence[str], remember: bool) -> list[Tensor]:
        """Return what the suffix takes for each text: states (length, hidden), or ids (length,) without a prefix."""

        def compute(missing: list[str]) -> list[Tensor]:
            ids = self.tokenizer(missing, truncation=True, max_length=self.settings.max_length)["input_ids"]
            rows = [torch.tensor(row, device=self.device) for row in ids]
            if self._prefix is None:
                return rows
            return self._in_equal_batches(rows, lambda batch: self._prefix(input_ids=batch).last_hidden_state)  # type: ignore[misc]

        return self._states_cache.get(texts, compute, remember)

    @torch.no_grad()
    def _in_equal_batches(self, rows: list[Tensor], run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Run rows of equal length together, in batches of one fixed number, so that no row's bits depend on others."""
        results: list[Tensor | None] = [None] * len(rows)
        by_length: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(number)
        with self._autocast():
            for numbers in by_length.values():
                for start in range(0, len(numbers), self._group):
                    group = numbers[start : start + self._group]
                    filled = group + group[:1] * (self._group - len(group))
                    for number, result in zip(group, run(torch.stack([rows[n] for n in filled])), strict=False):
                        results[number] = result.clone()  # a view would keep the whole group in memory
        return results  # type: ignore[return-value]


def _check_length(model: PreTrainedModel, settings: EncoderSettings) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # the first positions are the padding token's
    if settings.max_length > positions:
        raise SettingsError(f"max_length is {settings.max_length}, but {settings.model} has {positions} positions")
