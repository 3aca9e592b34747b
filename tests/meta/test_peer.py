"""Meta-gradients against a peer: PEFT's own LoRA, torchopt's differentiable SGD, and losses written example by example.

Nothing of textmeta computes the expected value: no shared forward, no batching of tasks, no inner loop.
"""

import copy
import math
import warnings
from collections.abc import Sequence

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModel, AutoTokenizer

from tests.meta.test_adaptation import moved_parameters
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.model.encoder import Encoder
from textmeta.model.initialisation import LORA

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchopt's own, on import
    import torchopt

STEP_SIZE, TEMPERATURE = 0.7, 10.0
PLAIN = InnerLoopSettings(steps=3, adapt=("lora_A", "lora_B"), normalise=False, lora_step_size=STEP_SIZE)

Factors = dict[str, Tensor]


class Peer:
    """A PEFT model, and its LoRA factors by PEFT's names."""

    def __init__(self, encoder: Encoder) -> None:
        folder = encoder.settings.model
        base = AutoModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = get_peft_model(base, copy.deepcopy(encoder.peft_config)).eval()
        self.names = [name for name, value in self.model.named_parameters() if value.requires_grad]

    def features(self, factors: Factors, texts: Sequence[str]) -> list[Tensor]:
        found = []
        for text in texts:
            ids = torch.tensor([self.tokenizer(text)["input_ids"]])
            hidden = functional_call(self.model, factors, kwargs={"input_ids": ids}).last_hidden_state
            found.append(hidden[0].mean(0))
        return found

    def support_loss(self, factors: Factors, e: Episode) -> Tensor:
        features = self.features(factors, e.support_texts)
        labels = [int(label) for label in e.support_labels]
        losses = []
        for i, label in enumerate(labels):
            if labels.count(label) == 1:
                continue
            others = [[f for j, f in enumerate(features) if labels[j] == c and j != i] for c in range(e.ways)]
            losses.append(loss_of(features[i], label, others))
        return torch.stack(losses).mean()

    def query_loss(self, factors: Factors, e: Episode) -> Tensor:
        features = self.features(factors, e.support_texts)
        classes = [[f for f, own in zip(features, e.support_labels, strict=True) if own == c] for c in range(e.ways)]
        queries = self.features(factors, e.query_texts)
        losses = [loss_of(f, int(label), classes) for f, label in zip(queries, e.query_labels, strict=True)]
        return torch.stack(losses).mean()


def loss_of(feature: Tensor, label: int, classes: list[list[Tensor]]) -> Tensor:
    prototypes = [torch.stack([f / f.norm() for f in members]).mean(0) for members in classes]
    logits = torch.stack([TEMPERATURE * cosine_similarity(feature, each, dim=0) for each in prototypes])
    return cross_entropy(logits, torch.tensor(label))


@pytest.mark.parametrize("second_order", [False, True])
def test_meta_gradients_are_the_peers(second_order: bool, encoder64: Encoder, corpus: Corpus) -> None:
    episodes = EpisodeSampler(corpus, EpisodeSettings((2, 3), (1, 3), 2, unbalanced=True), seed=1).take(2)
    parameters = {key: value.double() for key, value in moved_parameters(encoder64, PLAIN).items()}
    parameters["log_step_size.lora"].fill_(math.log(STEP_SIZE))
    parameters["log_temperature"].fill_(math.log(TEMPERATURE))
    peer = Peer(encoder64)
    key_of = {name: LORA + name.removeprefix("base_model.model.").replace(".default", "") for name in peer.names}
    assert {key for key in parameters if key.startswith(LORA)} == set(key_of.values())
    start = {name: parameters[key_of[name]].clone().requires_grad_() for name in peer.names}
    total = torch.zeros((), dtype=torch.float64)
    for e in episodes:
        sgd = torchopt.sgd(lr=STEP_SIZE)
        now, state = start, sgd.init(start)
        for _ in range(PLAIN.steps):
            loss = peer.support_loss(now, e)
            gradients = torch.autograd.grad(loss, list(now.values()), create_graph=second_order)
            updates, state = sgd.update(dict(zip(now, gradients, strict=True)), state, inplace=False)
            now = torchopt.apply_updates(now, updates, inplace=False)
        total = total + peer.query_loss(now, e)
    expected = dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))

    name = "maml" if second_order else "fomaml"
    found = ALGORITHMS[name].gradient(encoder64, parameters, episodes, PLAIN, MetaGradientSettings())
    torch.testing.assert_close(found.loss.sum(), total, rtol=1e-9, atol=0)
    for peer_name, value in expected.items():
        assert value.norm() > 1e-4
        torch.testing.assert_close(found.gradient[key_of[peer_name]], value, rtol=1e-7, atol=1e-10)
