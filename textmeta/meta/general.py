"""Any encoder, without an adapter of its own: what was learned on another one, as far as it is general."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textmeta.encoder.encoder import Encoder, EncoderSettings, most_tokens
from textmeta.encoder.lora import TARGETS, LoraSettings
from textmeta.encoder.pretrained import Pretrained, sentence_settings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import logger
from textmeta.files import at_home
from textmeta.hub import HubAccess
from textmeta.meta.adapter import Adapter, as_encoder_errors
from textmeta.meta.initialisation import LORA, Initialisation
from textmeta.meta.learner import TaskLearner

_say_once = functools.cache(logger.warning)

OF_ENCODER = ("queries", "centre", "name_centre")  # beside LoRA
STRENGTHS = ("log_centre_strength", "log_name_centre_strength")  # of centres that are not known here
NO_STRENGTH = -30.0
BY_LAYER = ("view_prior", "log_step_sizes", "loss_view_weights", "name_view_weights")


def load_any_encoder(
    numbers: Adapter, model: str | None, *, untrained: bool, max_length: int | None, access: HubAccess, **how: Any
) -> TaskLearner:
    """Load an encoder, and return what learns tasks with it: an adapter if it is its own, else the general numbers.

    The adapter ``numbers`` has them; if it is to be ``untrained``, its own encoder has them alone, too. Without a model
    that is the one that is loaded. By default texts are cut after the adapter's number of tokens, or what the encoder
    can read. EncoderError if it cannot be loaded.
    """
    name = at_home(model or numbers.encoder.model)
    with as_encoder_errors(name):
        loaded = numbers.load_encoder(model, access)
        if loaded.weights_sha256 == numbers.weights_sha256 and not untrained:
            reader = numbers.load_reader(model=name, pretrained=loaded, access=access, **how)
            return TaskLearner(reader, numbers.to(reader.encoder.device))
        length = max_length or int(min(numbers.encoder.max_length, most_tokens(loaded.model)))
        settings = EncoderSettings(name, max_length=length, long_texts=numbers.encoder.long_texts)
        encoder = Encoder(settings, _least_lora(loaded), access=access, pretrained=loaded, **how)
        encoder.prompt, encoder.first_token = sentence_settings(loaded.folder)
        adapter = general_adapter(TokenStateReader(encoder), numbers)
    _say_once(
        f"the encoder {name} is used without an adapter, with numbers that were learned on {numbers.encoder.model}; "
        "`textmeta train` makes an adapter, which is better"
    )
    return TaskLearner(TokenStateReader(encoder), adapter.to(encoder.device))


def general_adapter(reader: TokenStateReader, numbers: Adapter) -> Adapter:
    """Return an adapter of an encoder that nothing was trained on, with the general numbers of another one.

    LoRA does nothing, pooling is the mean, and centres are those of the task alone. Numbers by layer are those of the
    same relative depth, the last layer of the other adapter taken for its encoder's last. The rule for what is out of
    scope is left out: here it would reject nearly all.
    """
    encoder = reader.encoder
    learner = replace(numbers.learner, layers=reader.layers)
    start = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, learner, seed=0)
    theirs = np.array(numbers.learner.layers) / max(numbers.learner.layers or ())
    own = np.array(reader.layers) / encoder.total_layers

    def general(name: str, value: Tensor) -> Tensor:
        if name.startswith(LORA) or name in (*OF_ENCODER, "lora_log_step_sizes"):
            return value
        if name in STRENGTHS:
            return torch.full_like(value, NO_STRENGTH)
        learned = getattr(numbers.initialisation, name).detach().cpu()
        if name in BY_LAYER:
            rows = np.apply_along_axis(lambda row: np.interp(own, theirs, row), -1, learned.numpy())
            return torch.from_numpy(rows).to(value)
        return learned  # type: ignore[no-any-return]

    tensors = {name: general(name, value) for name, value in start.tensors().items()}
    return Adapter.of(reader, learner, start.with_tensors(tensors))


def _least_lora(loaded: Pretrained) -> LoraSettings:
    """Return settings of a LoRA that does nothing: of the last layer alone, at any maps of a family not known."""
    model = loaded.model
    ends = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = None if model.config.model_type in TARGETS else tuple(sorted(ends))
    return LoraSettings(layers=1, rank=1, alpha=1, targets=targets)
