"""Splitting a transformer into frozen lower layers and adapted upper layers, exactly."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from textmeta.errors import EncoderError

__all__ = ["find_layers", "split_model"]

logger = logging.getLogger(__name__)

# Children of a model, other than its layers, that only one of the halves runs.
BEFORE_LAYERS = ("embeddings", "embeddings_project")  # the latter is ELECTRA's
AFTER_LAYERS = ("final_norm",)  # ModernBERT's


class _PassThrough(nn.Module):
    """Stands in for a module of the other half: its input already is the hidden state."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        # families differ in the order and names of the arguments; the states are the one that is floating
        return next(v for v in (*arguments, *named.values()) if isinstance(v, Tensor) and v.is_floating_point())


def find_layers(model: PreTrainedModel) -> str:
    """Return the name of the list of a transformer's layers (``encoder.layer``).

    Raises:
        EncoderError: if it has none.
    """
    total: int = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return str(name)
    raise EncoderError(
        f"{type(model).__name__} has no list of its {total} layers; expected a transformer encoder such as BERT"
    )


def split_model(model: PreTrainedModel, layers_name: str, first: int) -> tuple[nn.Module | None, nn.Module]:
    """Split a transformer below layer ``first`` into (prefix, suffix), or (None, model) where that is not exact.

    Both halves are the model's own class: the prefix with fewer layers and nothing after them, the suffix with its
    embeddings passed through, so each family's masks and positions are its own code. A probe decides whether the split
    is exact.
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
            raise EncoderError(
                f"{type(model).__name__} does not run on token ids alone, expected an encoder such as BERT: {error}"
            ) from error
        try:
            states = prefix(input_ids=probe, attention_mask=mask).last_hidden_state
            halves = suffix(inputs_embeds=states, attention_mask=mask).last_hidden_state
            exact = torch.allclose(whole[mask.bool()], halves[mask.bool()], rtol=1e-5, atol=1e-6)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, StopIteration) as error:
            logger.debug("the halves do not run: %s", error)
            exact = False
    if exact and without_before:
        return prefix, suffix
    logger.warning(
        "%s cannot be split into frozen and adapted layers exactly: the frozen layers are not cached, which is slower",
        type(model).__name__,
    )
    return None, model
