"""What the engine is measured against: the loop that people write, and the same with torchopt's optimiser.

One task after another; in each inner step a forward of the whole PEFT model over that task's support set, padded to
its longest text, through ``functional_call``; ``autograd.grad``; at last a forward over the support set, for the
prototypes, and one over the queries.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torchopt
from peft import get_peft_model
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from textmeta.data.episodes import Episode
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.model.encoder import Encoder
from textmeta.model.heads import HEADS, class_mask, cross_entropy_per_task
from textmeta.model.initialisation import OFFSET, Parameters, head_scalars, lora_factors, step_sizes
from textmeta.model.pretrained import load_pretrained

__all__ = ["Loop", "TorchoptLoop"]

PEFT = "base_model.model."


class Loop:
    """The loop of today, with textmeta's loss and step, so that the meta-gradients can be compared.

    Args:
        encoder: whose pretrained model, LoRA settings, device and precision it takes; nothing of it is run.
        inner: number of steps; they adapt the B factors and the head's offset.
    """

    def __init__(self, encoder: Encoder, inner: InnerLoopSettings) -> None:
        pretrained = load_pretrained(encoder.settings.model, encoder.settings.revision)
        model, self.tokenizer = pretrained.model, pretrained.tokenizer
        self.model = get_peft_model(model, encoder.peft_config).to(encoder.device).eval().requires_grad_(False)
        self.encoder, self.inner, self.head = encoder, inner, HEADS["prototype"]
        self.ids: dict[str, Tensor] = {}

    def prepare(self, episodes: Sequence[Episode]) -> None:
        """Tokenize, once, what is timed later."""
        texts = list({text for e in episodes for text in (*e.support_texts, *e.query_texts)} - self.ids.keys())
        if texts:
            length = self.encoder.settings.max_length
            rows = self.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
            self.ids |= {
                text: torch.tensor(row, device=self.encoder.device) for text, row in zip(texts, rows, strict=True)
            }

    def features(self, factors: Parameters, texts: Sequence[str]) -> Tensor:
        """Return (1, n, d) features."""
        rows = [self.ids[text] for text in texts]
        ids = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        named = {PEFT + name.replace(".weight", ".default.weight"): value for name, value in factors.items()}
        with self.encoder._autocast():
            given = {"input_ids": ids, "attention_mask": mask}
            hidden = functional_call(self.model, named, kwargs=given).last_hidden_state.float()
        weights = mask.to(hidden.dtype)[..., None]
        return normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)[None]

    def meta_gradient(self, parameters: Parameters, episodes: Sequence[Episode], second_order: bool) -> Parameters:
        """Return the meta-gradient summed over episodes, of MAML or of FOMAML."""
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for e in episodes:
            loss = self.query_loss(leaves, e, second_order)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, part in zip(leaves, found, strict=True):
                if part is not None:
                    total[name] += part
        return total

    def query_loss(self, parameters: Parameters, e: Episode, second_order: bool) -> Tensor:
        """Adapt to one episode and return its query loss."""
        device = self.encoder.device
        labels = torch.as_tensor(e.support_labels, device=device)[None]
        query_labels = torch.as_tensor(e.query_labels, device=device)[None]
        mask = class_mask(torch.tensor([e.ways], device=device))
        factors, scalars = lora_factors(parameters), head_scalars(parameters)
        fast = {name: value for name, value in factors.items() if ".lora_B." in name}
        fast[OFFSET] = torch.zeros(1, e.ways, self.encoder.hidden_size, device=device, requires_grad=True)
        update = self.optimiser(parameters, fast)
        for step in range(self.inner.steps):
            with sdpa_kernel(SDPBackend.MATH) if second_order else nullcontext():
                features = self.features({**factors, **{n: v for n, v in fast.items() if n != OFFSET}}, e.support_texts)
                logits, counts = self.head.support_logits(features, labels, fast[OFFSET], scalars, mask)
                loss = cross_entropy_per_task(logits, labels, counts).sum()
                found = torch.autograd.grad(loss, list(fast.values()), create_graph=second_order)
            fast = update(step, fast, dict(zip(fast, found, strict=True)))
        factors |= {name: value for name, value in fast.items() if name != OFFSET}
        weights = self.head.weights(self.features(factors, e.support_texts), labels, fast[OFFSET], scalars)
        logits = self.head.logits(self.features(factors, e.query_texts), weights, scalars, mask)
        return cross_entropy_per_task(logits, query_labels, query_labels >= 0).sum()

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """Return a gradient over its root mean square."""
        epsilon = self.inner.offset_epsilon if name == OFFSET else self.inner.lora_epsilon
        return gradient / (gradient.square().mean().sqrt() + epsilon)

    def optimiser(
        self, parameters: Parameters, fast: Parameters
    ) -> Callable[[int, Parameters, Parameters], Parameters]:
        """Return (step, tensors, gradients) → tensors after one normalised step."""
        return lambda step, values, gradients: {
            name: value - step_sizes(parameters, name)[step] * self.direction(name, gradients[name])
            for name, value in values.items()
        }


class TorchoptLoop(Loop):
    """The same loop, its steps taken by torchopt: a normalising transformation, then torchopt's update."""

    def optimiser(
        self, parameters: Parameters, fast: Parameters
    ) -> Callable[[int, Parameters, Parameters], Parameters]:
        """Return (step, tensors, gradients) → tensors after one normalised step."""

        def normalised(gradients: Parameters, step: int, *, params: object = None, inplace: bool = False) -> tuple:
            updates = {
                name: -step_sizes(parameters, name)[step] * self.direction(name, gradient)
                for name, gradient in gradients.items()
            }
            return updates, step + 1

        transformation = torchopt.base.GradientTransformation(lambda _: 0, normalised)
        state = transformation.init(fast)

        def update(_: int, values: Parameters, gradients: Parameters) -> Parameters:
            nonlocal state
            updates, state = transformation.update(gradients, state, params=values, inplace=False)
            return torchopt.apply_updates(values, updates, inplace=False)  # type: ignore[no-any-return]

        return update
