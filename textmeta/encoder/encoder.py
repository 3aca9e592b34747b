"""The encoder: a frozen transformer whose upper layers carry LoRA, split, exactly, in two.

The layers below the lowest LoRA give every task the same, so they can be run once per text and their states kept.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from textmeta.data.labels import one_of, whole_number
from textmeta.encoder.attention import SWITCHED
from textmeta.encoder.lora import LoraSettings, inject, lora_config
from textmeta.encoder.pretrained import DEFAULT_ENCODER, Pretrained, load_pretrained
from textmeta.errors import EncoderError, SettingsError, logger
from textmeta.files import at_home, is_folder
from textmeta.hub import HubAccess

OVERHEAD = 128  # what one more forward costs on a CPU, in tokens of another

LongTexts = Literal["cut", "window"]
# Children of a model, other than its layers, that only one of the halves runs.
BEFORE_LAYERS = ("embeddings", "embeddings_project")  # the latter is ELECTRA's
AFTER_LAYERS = ("final_norm",)  # ModernBERT's


@dataclass(frozen=True)
class EncoderSettings:
    """Which encoder, and how much of a text it reads.

    Args:
        model: folder, or id on the Hub, of any transformers text encoder.
        revision: branch, tag or commit on the Hub.
        max_length: texts are cut after this many tokens.
        long_texts: "cut" reads no more of a longer one, "window" overlapping parts of this length, whose views are
            averaged.
    """

    model: str = DEFAULT_ENCODER
    revision: str | None = None
    max_length: int = 256
    long_texts: LongTexts = "cut"

    def __post_init__(self) -> None:
        one_of("long_texts", self.long_texts, get_args(LongTexts))
        whole_number("max_length", self.max_length, 3)  # a text's own token stands between two special ones


# texts that were cut when they were tokenized, and after how many tokens; mostly unknown ones, and to which encoder
_noted: ContextVar[tuple[set[tuple[str, int]], set[tuple[str, str]]] | None] = ContextVar("noted", default=None)


@contextmanager
def warning_of(texts: Sequence[str], where: str, start: int = 0, told: set[str] | None = None) -> Iterator[None]:
    """Warn of those texts that are found to be cut, or mostly unknown to the tokenizer, when they are read meanwhile.

    One warning of each kind, at the line that called the caller's caller; outside of it there is none, within another
    one that one warns. Of a batch of a stream, which begins in row ``start``, those that have been ``told`` are left
    out.
    """
    if _noted.get() is not None:
        yield
        return
    cut, unknown = set[tuple[str, int]](), set[tuple[str, str]]()
    token = _noted.set((cut, unknown))
    try:
        yield
    finally:
        _noted.reset(token)
    more = "a larger max_length reads more of them, long_texts='window' all"
    other = "it hardly tells such texts apart, and may be of another language"  # as Chinese ones to an English encoder
    for kind, noted, what, advice in (
        ("", cut, "cut at {} tokens", more),
        ("most tokens of ", unknown, "unknown to the encoder {}", other),
    ):
        found = {text for text, _ in noted}.intersection(texts)
        rows = [row for row, text in enumerate(texts) if text in found]
        if rows and kind not in (told or ()):
            by = " or ".join(sorted(str(by) for by in {by for text, by in noted if text in found}))
            all_ = f"{len(rows)} of {'the first ' * (told is not None)}{start + len(texts)} texts"
            first = f"first of row {start + rows[0]}, {texts[rows[0]]!r:.60}"
            if told is not None:
                told.add(kind)
            warnings.warn(f"{where}: {kind}{all_} are {what.format(by)}, {first}; {advice}", stacklevel=5)


class TextTokenizer:
    """Makes token ids of texts, each with a prompt before it, by a tokenizer and as an encoder's settings say."""

    def __init__(self, settings: EncoderSettings, tokenizer: Any, prompt: str = "") -> None:
        self.settings, self.tokenizer, self.prompt = settings, tokenizer, prompt

    def tokenize(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Return the token ids of each text, in its windows: one, or as many as a long text takes where these are read.

        A window begins with the last quarter of the one before.
        """
        length, special = self.settings.max_length, self.tokenizer.num_special_tokens_to_add()
        # cut in one way whatever is read: the tokenizer keeps it from call to call, and threads share it
        given, stride = [self.prompt + text for text in texts], max(0, length - special) // 4
        found = self.tokenizer(given, truncation=True, max_length=length, stride=stride)
        # a tokenizer that is Python alone does not tell what it cuts
        parts = [[part, *part.overflowing] for part in found.encodings or ()]
        whole = self.settings.long_texts == "window"
        windows = [[part.ids for part in (own if whole else own[:1])] for own in parts]
        windows = windows or [[ids] for ids in found["input_ids"]]
        noted = _noted.get()
        if noted is not None:
            unknown = {self.tokenizer.unk_token_id} - {None, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id}
            cut = (text for text, own in zip(texts, parts, strict=False) if len(own) > 1 and not whole)
            noted[0].update((text, length) for text in cut)
            for text, own in zip(texts, windows, strict=True):
                ids = [number for part in own for number in part]
                if 2 * sum(map(ids.count, unknown)) > len(ids) - special * len(own):
                    noted[1].add((text, self.settings.model))
        return windows


class Encoder(TextTokenizer):
    """A frozen transformer with LoRA on its upper layers.

    In "bf16" its matrix products are in bfloat16 (autocast); weights with LoRA, its factors and their gradients stay
    float32. A transformer that has been loaded (``pretrained``) is taken as it is: its linear maps become those of this
    encoder. EncoderError if it cannot be loaded or has no layers that can carry LoRA; SettingsError if a setting does
    not fit.
    """

    def __init__(
        self,
        settings: EncoderSettings | None = None,
        lora: LoraSettings | None = None,
        device: str | torch.device = "cpu",
        precision: str = "no",
        access: HubAccess | None = None,
        pretrained: Pretrained | None = None,
    ) -> None:
        if precision not in ("no", "bf16"):
            why = ": the inner loop's gradients vanish in half precision; bf16 has the range" * (precision == "fp16")
            raise SettingsError(f"precision must be 'no' or 'bf16', given {precision!r}{why}")
        settings = settings or EncoderSettings()
        if is_folder(local := at_home(settings.model)):  # a relative path would look like an id on the Hub elsewhere
            settings = replace(settings, model=str(Path(local).resolve()))
        self.device = device_of(device)
        self.lora, self.precision, self.access = lora or LoraSettings(), precision, access
        loaded = pretrained or load_pretrained(settings.model, settings.revision, access)
        model, tokenizer, self.commit, self.weights_sha256, _ = loaded
        super().__init__(settings, tokenizer)
        if settings.long_texts == "window" and not self.tokenizer.is_fast:
            raise SettingsError(f"long_texts must be 'cut': the tokenizer of {settings.model} cannot cut in windows")
        self.first_token = False  # whether a text's last view is the state of its first token alone
        self.source = (settings.model, self.commit or settings.revision)  # to load the same transformer from again
        positions = most_tokens(model)
        if settings.max_length > positions:
            raise SettingsError(f"max_length is {settings.max_length}, but {settings.model} has {positions} positions")
        self.tokenize([""])  # sets the length, which is then the same in each call, of whatever thread
        self.hidden_size: int = model.config.hidden_size
        layers_name = _find_layers(model)
        self.total_layers = total = len(model.get_submodule(layers_name))  # type: ignore[arg-type]
        first = total - (self.lora.layers or max(1, total // 2))
        if first < 0:
            raise SettingsError(f"lora layers is {self.lora.layers}, but the encoder has {total}")
        if model.config._attn_implementation == "sdpa":  # "eager" (MPNet, DeBERTa) has second derivatives anyway
            model.set_attn_implementation(SWITCHED)
        self.peft_config = lora_config(model, layers_name, first, self.lora)
        self.factor_shapes = inject(model, self.peft_config.target_modules or (), self.lora)
        model.to(self.device)  # type: ignore[arg-type]
        self._prefix, self._suffix = _split(model, layers_name, first)
        if precision == "bf16":  # once, as autocast would in each forward; those with LoRA are made of both in float32
            for module in model.get_submodule(layers_name).modules():
                if type(module) is nn.Linear:
                    module.to(torch.bfloat16)
        self.frozen_layers = None if self._prefix is None else first  # below the lowest LoRA; None where not split
        # launches on a GPU cost more
        self.overhead = OVERHEAD if self.device.type == "cpu" else 4096

    def with_length(self, max_length: int) -> "Encoder":
        """Return an encoder of the same weights that cuts texts after so many tokens, with a tokenizer of its own."""
        if max_length == self.settings.max_length:
            return self
        made = copy.copy(self)
        made.settings, made.tokenizer = replace(self.settings, max_length=max_length), copy.deepcopy(self.tokenizer)
        return made

    def states(self, inputs: Tensor, mask: Tensor, *, adapted: bool) -> tuple[Tensor, ...]:
        """Return the states (rows, length, hidden) that enter the frozen or the adapted layers, and after each of them.

        The adapted layers, all of a model that cannot be split, are run with the factors in use, on the last states of
        the frozen ones; else inputs are token ids (rows, length). The mask (rows, length) is True for tokens. States
        are at least float32.
        """
        model = self._suffix if adapted else self._prefix
        assert model is not None, "the model is not split"
        key = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            output = model(**{key: inputs, "attention_mask": mask.long()}, output_hidden_states=True)
        # some families report nothing where there is no layer: then the last states are the embeddings
        found = tuple(output.hidden_states) or (output.last_hidden_state,)
        return tuple(states.to(torch.promote_types(states.dtype, torch.float32)) for states in found)


def best_precision(device: torch.device) -> str:
    """Return "bf16" where a device multiplies matrices faster in bfloat16 than in float32, else "no".

    Of CPUs those with AMX do. With AVX512-BF16 alone MiniLM takes 1.7 times as long as in float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if device.type == "cpu" and able.get("amx_bf16") else "no"


def device_of(device: str | torch.device | None) -> torch.device:
    """Return a device by its name; None is what there is: cuda, mps or cpu, in this order.

    SettingsError if there is no such kind of device, or none of it on this machine.
    """
    if device is None:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(name for name, found in there.items() if found))
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, TypeError, AssertionError) as error:  # the last is how torch says that it has no CUDA
        told = f"no such device: {device!r:.60}; expected 'cpu', 'cuda', 'cuda:1', 'mps' …, which this machine has"
        raise SettingsError(f"{told}: {error!s:.100}") from error
    return found


def most_tokens(model: PreTrainedModel) -> float:
    """Return how many tokens of a text a transformer can read."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    # the first positions are the padding token's
    return positions - 2 * (model.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"))


class _PassThrough(nn.Module):
    """Stands in for a module of the other half: its input already is the hidden state."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        # families differ in the order and names of the arguments; the states are the one that is floating
        return next(v for v in (*arguments, *named.values()) if isinstance(v, Tensor) and v.is_floating_point())


def _find_layers(model: PreTrainedModel) -> str:
    """Return the name of the list of a transformer's layers (``encoder.layer``); EncoderError if it has none."""
    total: int = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return str(name)
    raise EncoderError(f"{type(model).__name__} has no list of its {total} layers; expected an encoder such as BERT")


def _split(model: PreTrainedModel, layers_name: str, first: int) -> tuple[nn.Module | None, nn.Module]:
    """Split a transformer below layer ``first`` into (prefix, suffix); (None, model) where a probe shows a difference.

    Both halves are the model's own class: the prefix with fewer layers and nothing after them, the suffix with its
    embeddings passed through, so each family's masks and positions are its own code.
    """
    layers: nn.ModuleList = model.get_submodule(layers_name)  # type: ignore[assignment]
    # deepcopy with these answers given: all weights that both halves use stay shared
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    without_after = {id(module): _PassThrough() for name, module in model.named_children() if name in AFTER_LAYERS}
    without_before = {id(module): _PassThrough() for name, module in model.named_children() if name in BEFORE_LAYERS}
    prefix = copy.deepcopy(model, {**shared, **without_after, id(layers): layers[:first]})
    suffix = copy.deepcopy(model, {**shared, **without_before, id(layers): layers[first:]})
    device = next(model.parameters()).device
    probe = torch.arange(10, 18, device=device).reshape(2, 4) % model.config.vocab_size
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=device)
    with torch.no_grad():
        try:
            whole = model(input_ids=probe, attention_mask=mask).last_hidden_state
        except (TypeError, ValueError) as error:
            told = f"{type(model).__name__} does not run on token ids alone, expected an encoder such as BERT: {error}"
            raise EncoderError(told) from error
        try:
            states = prefix(input_ids=probe, attention_mask=mask).last_hidden_state
            halves = suffix(inputs_embeds=states, attention_mask=mask).last_hidden_state
            exact = torch.allclose(whole[mask.bool()], halves[mask.bool()], rtol=1e-5, atol=1e-6)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, StopIteration) as error:
            logger.debug("the halves do not run: %s", error)
            exact = False
    if exact and without_before:
        return prefix, suffix
    told = "cannot be split into frozen and adapted layers exactly: the frozen layers are not cached, which is slower"
    logger.warning("%s %s", type(model).__name__, told)
    return None, model
