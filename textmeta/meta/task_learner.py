"""The task learner: from an initialisation and one support set, a classifier of features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from textmeta.errors import AdapterError
from textmeta.meta.adaptation import BAR_AFTER, adapt, left_out_logits, task_size, task_weights
from textmeta.meta.adapted import AdaptedParameters, support_features
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.tasks import TaskBatch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS, class_mask
from textmeta.model.initialisation import SCOPE, head_scalars
from textmeta.model.scope import rule_of_task, scope_probability, task_inputs, text_inputs

__all__ = ["LearnedTask", "learn_task", "scope_rule", "text_logits"]

CHUNK = 512  # texts that go through the encoder together


@dataclass(frozen=True)
class LearnedTask:
    """What was learned of one task.

    Args:
        factors: LoRA factors (out, in) by name.
        weights: (C, d), the head.
        temperature: ().
        scope: (4,), the rule for what is out of scope (:mod:`textmeta.model.scope`); None where there is none.
    """

    factors: dict[str, Tensor]
    weights: Tensor
    temperature: Tensor
    scope: Tensor | None

    def scope_probability(self, logits: Tensor) -> Tensor:
        """Return (n,) the probability of texts to belong to any of the classes, from their logits (n, C).

        Raises:
            AdapterError: if there is no rule.
        """
        if self.scope is None:
            raise AdapterError(
                "this adapter has no rule for what is out of scope: calibrate it (textmeta.meta.calibration), or take "
                "one that has, such as textmeta/minilm-general"
            )
        return scope_probability(self.scope, text_inputs(logits, self.temperature))


@torch.no_grad()
def learn_task(
    encoder: Encoder, parameters: Mapping[str, Tensor], inner: InnerLoopSettings, support: TaskBatch
) -> LearnedTask:
    """Adapt to the support set of one task.

    Args:
        encoder: makes features.
        parameters: the initialisation.
        inner: the inner loop.
        support: a batch of one task.

    Raises:
        AdapterError: if the head that comes out is not finite, or its temperature not positive.
    """
    adapted = adapt(encoder, parameters, support, inner, progress="fit")
    features = support_features(encoder, adapted, support)
    weights = task_weights(encoder, adapted.with_features(features), support)[0]
    temperature = adapted.scalars["temperature"].view(-1)[0]  # one for all tasks, or one for each
    if not (weights.isfinite().all() and temperature.isfinite() and temperature > 0):
        raise AdapterError(
            "fit: the adapter makes of this task a head that is not finite, or a temperature of "
            f"{temperature:.3g}; it is broken, or was not meant for such tasks"
        )
    scope = scope_rule(adapted, features, support, parameters[SCOPE]) if SCOPE in parameters else None
    factors = {name: value[0] if value.ndim == 3 else value for name, value in adapted.factors.items()}
    return LearnedTask(factors, weights, temperature, scope)


def scope_rule(adapted: AdaptedParameters, features: Tensor, support: TaskBatch, rule: Tensor) -> Tensor:
    """Return (4,) the rule for what is out of the scope of one task, from an adapter's (8,).

    Args:
        adapted: to a batch of one task.
        features: (1, n, d), of its support set.
        support: the batch.
        rule: of the adapter.
    """
    left_out, counts = left_out_logits(adapted, features, support)
    temperature, size = adapted.scalars["temperature"].view(-1)[0], task_size(support.labels, support.ways)[0]
    return rule_of_task(rule, task_inputs(left_out[0], support.labels[0], counts[0], size, temperature))


@torch.no_grad()
def text_logits(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    learned: LearnedTask,
    texts: Sequence[str],
) -> Tensor:
    """Return logits (n, C) of texts, by what was learned of a task from these parameters."""
    head, weights = HEADS[inner.head], learned.weights
    scalars = head_scalars(parameters) | {"temperature": learned.temperature}
    mask = class_mask(torch.tensor([len(weights)], device=weights.device))
    parts = [weights.new_empty(0, len(weights))]
    starts = range(0, len(texts), CHUNK)
    for start in tqdm(starts, desc="predict", unit=f"{CHUNK} texts", delay=BAR_AFTER, leave=False):
        prepared = encoder.prepare(texts[start : start + CHUNK], remember=False)
        features = encoder.features(prepared, learned.factors)
        parts.append(head.logits(features[None], weights[None], scalars, mask)[0])
    return torch.cat(parts)
