"""Meta-gradients against peers: PEFT's own LoRA, torchopt's differentiable SGD, and losses written example by example.

Nothing of textmeta computes the expected value: no shared forward, no batching of tasks, no inner loop. What follows
the inner loop is :mod:`tests.heads.reference`, one task at a time, its linear systems solved by ``torch.linalg.solve``.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModel, AutoTokenizer

from tests.given import Patch
from tests.heads import reference
from tests.heads.reference import Task
from tests.meta.given import LAYERS, batch_of, episode_of, leaves_of, make_learner, make_task
from textmeta.data.corpus import Corpus
from textmeta.encoder.encoder import Encoder
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.initialisation import Adapt, LearnerSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchopt's own, on import
    import torchopt

Tensors = dict[str, Tensor]
PEFT_PREFIX, STEPS = "base_model.model.", 6


class Peer:
    """A PEFT model; LoRA's factors by textmeta's names are given to each of its forwards, of one text."""

    def __init__(self, encoder: Encoder) -> None:
        folder = encoder.settings.model
        base = AutoModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = get_peft_model(base, copy.deepcopy(encoder.peft_config)).eval()
        own = [name for name, value in self.model.named_parameters() if value.requires_grad]
        self.names = {name.removeprefix(PEFT_PREFIX).replace(".default", ""): name for name in own}

    def read(self, texts: list[str], factors: Mapping[str, Tensor]) -> list[Tensor]:
        given = {self.names[name]: value for name, value in factors.items()}
        found = []
        for text in texts:
            ids = torch.tensor([self.tokenizer(text)["input_ids"]])
            output = functional_call(self.model, given, kwargs={"input_ids": ids, "output_hidden_states": True})
            found.append(torch.cat([output.hidden_states[layer] for layer in LAYERS]))
        return found


def steps_of_the_peer(second_order: bool) -> Callable[..., tuple[Tensor, Tensors, bool]]:
    """Return what takes LoRA's inner steps by torchopt, as :func:`tests.heads.reference.adapted` does in its own loop.

    The direction of a step is handed to torchopt as a gradient, with the step's own learning rate of each layer.
    """

    def adapted(task: Task, t: Tensors, adapt: str, read: reference.Read) -> tuple[Tensor, Tensors, bool]:
        factors = {name.removeprefix("lora."): value for name, value in t.items() if name.startswith("lora.")}
        sizes = [len(rows) for rows in reference.classes_of(task.labels).values()]
        if sum(size >= 2 for size in sizes) < 2:
            return t["queries"], factors, False
        start = {name: value for name, value in factors.items() if ".lora_B." in name}
        layers = sorted({int(name.split(".")[2]) for name in start})
        rates = t["lora_log_step_sizes"].exp()
        of_layer = {layer: [name for name in start if int(name.split(".")[2]) == layer] for layer in layers}
        sgd = {layer: torchopt.sgd(lr=lambda step, i=i: rates[int(step), i]) for i, layer in enumerate(layers)}
        now = dict(start)
        states = {layer: sgd[layer].init({name: now[name] for name in names}) for layer, names in of_layer.items()}
        k = len(task.labels) / len(sizes)
        gate = (t["step_gate"][0] + t["step_gate"][1] * math.log(1 + k)).sigmoid()
        pull = t["pull"].sigmoid()
        weights, scale = t["loss_view_weights"].softmax(0), t["loss_log_scale"].exp()
        for step in range(STEPS):
            u = reference.views_of(read(task.texts, {**factors, **now}), t["queries"])
            loss = reference.neighbourhood(u, task.labels, weights, scale)
            found = torch.autograd.grad(loss, list(now.values()), create_graph=second_order, retain_graph=True)
            gradients = dict(zip(now, found, strict=True))
            loss = loss if second_order else loss.detach()
            far = gate * torch.minimum(torch.ones_like(loss), loss)
            moved: Tensors = {}
            for number, (layer, names) in enumerate(of_layer.items()):
                directions = {}
                for name in names:
                    g = gradients[name]
                    back = pull / rates[step, number] * (now[name] - start[name])
                    directions[name] = far * g / (g.square().mean() + 1e-8).sqrt() + back
                updates, states[layer] = sgd[layer].update(directions, states[layer], inplace=False)
                moved |= torchopt.apply_updates({name: now[name] for name in names}, updates, inplace=False)
            now = {name: moved[name] for name in now}
        return t["queries"], {**factors, **now}, True

    return adapted


@pytest.mark.parametrize("adapt", ["pooling", "lora"])
@pytest.mark.parametrize("second_order", [False, True], ids=["fomaml", "maml"])
def test_gradients_are_the_peers(
    second_order: bool, adapt: Adapt, encoder64: Encoder, corpus: Corpus, monkeypatch: Patch
) -> None:
    """Pooling's steps are those of the reference, in a loop of its own; LoRA's are torchopt's."""
    learner, leaves = leaves_of(make_learner(encoder64, LearnerSettings(LAYERS, adapt, STEPS)))
    tasks = [
        make_task(corpus, (1, 2, 3), names=True, unlabelled=3),
        make_task(corpus, (2, 2), first=6),
        make_task(corpus, (1, 1), names=True, first=8),  # takes no steps
    ]
    peer = Peer(encoder64)
    assert {f"lora.{name}" for name in peer.names} == {name for name in leaves if name.startswith("lora.")}
    by_loop = partial(reference.adapted, second_order=second_order)
    monkeypatch.setattr(reference, "adapted", steps_of_the_peer(second_order) if adapt == "lora" else by_loop)
    losses = []
    for task in tasks:
        batch, _ = batch_of([task])  # folds go by the order of a batch
        task.texts, task.labels = list(batch.support.texts), batch.labels[0].tolist()
        logits = reference.task_logits(task, leaves, adapt, peer.read)
        losses.append(-logits.log_softmax(-1)[range(len(logits)), [*range(task.ways), 0]].mean())
    expected = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()), allow_unused=True)

    name = "maml" if second_order else "fomaml"
    found = ALGORITHMS[name].gradient(learner, [episode_of(task) for task in tasks], leaves)
    torch.testing.assert_close(found.loss, torch.stack(losses).detach(), rtol=1e-9, atol=0)
    for (leaf, value), part in zip(leaves.items(), expected, strict=True):
        part = torch.zeros_like(value) if part is None else part  # noqa: PLW2901
        torch.testing.assert_close(found.gradient[leaf], part, rtol=1e-7, atol=1e-9, msg=lambda m, n=leaf: f"{n}: {m}")
    felt = {leaf for leaf, part in zip(leaves, expected, strict=True) if part is not None and part.norm() > 1e-4}
    assert {leaf for leaf in leaves if leaf.startswith("lora.")} < felt
    sizes = "lora_log_step_sizes" if adapt == "lora" else "log_step_sizes"
    assert {sizes, "pull", "step_gate", "queries", "temperature"} < felt
    assert ({"loss_log_scale", "loss_view_weights"} < felt) == second_order
