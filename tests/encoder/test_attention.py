"""Attention that can be differentiated twice: same values, and the choice does not outlive its block."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from textmeta.encoder.attention import attention_by, plain_attention, use_switched_attention

IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
MASK = (IDS > 0).long()


@pytest.fixture(scope="module")
def model() -> BertModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            initializer_range=0.3,
        )  # fmt: skip
        model = BertModel(config, add_pooling_layer=False).double().eval().requires_grad_(False)
    use_switched_attention(model)
    return model


def states(model: BertModel, embeddings: Tensor) -> Tensor:
    return model(inputs_embeds=embeddings, attention_mask=MASK).last_hidden_state[MASK.bool()]


def start(model: BertModel) -> Tensor:
    return model.embeddings.word_embeddings(IDS).clone().requires_grad_()


def curvature(model: BertModel, embeddings: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(states(model, embeddings).square().sum(), embeddings, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), embeddings)[0]


def test_second_derivatives_exist_only_inside(model: BertModel) -> None:
    embeddings = start(model)
    with attention_by(plain_attention):
        assert curvature(model, embeddings).isfinite().all()
    with pytest.raises(RuntimeError, match="not implemented"):  # the fast kernels are back
        curvature(model, embeddings)


def test_an_error_restores_the_fast_kernels(model: BertModel) -> None:
    with pytest.raises(ZeroDivisionError), attention_by(plain_attention):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="not implemented"):
        curvature(model, start(model))


def test_eager_models_are_left_alone(model: BertModel) -> None:
    eager = BertModel._from_config(model.config, attn_implementation="eager")
    use_switched_attention(eager)
    assert eager.config._attn_implementation == "eager"
