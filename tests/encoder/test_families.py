"""Every family of encoders: splitting, LoRA, per-task factors and second derivatives, on tiny random models."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.encoder.given import FAMILIES, TARGETS, TEXTS, UNSPLIT, assert_close, moved_factors, save_family, states_of
from tests.given import Logged, doubled
from textmeta.encoder.attention import attention_by, plain_attention
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraSettings, zero_start
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import EncoderError

each_family = pytest.mark.parametrize("family", FAMILIES)


def make_encoder(tmp_path: Path, family: str, layers: int = 2) -> Encoder:
    lora = LoraSettings(layers=layers, rank=4, targets=TARGETS.get(family))
    return Encoder(EncoderSettings(save_family(tmp_path, family), max_length=16), lora)


@pytest.mark.parametrize("lora_layers", [2, 4])
@each_family
def test_states_are_those_of_transformers(family: str, lora_layers: int, tmp_path: Path, caplog: Logged) -> None:
    """Of whatever layers, without LoRA, with LoRA that does nothing, and with LoRA against PEFT's own model."""
    if family.startswith("deberta") and lora_layers == 4:
        pytest.skip("DeBERTa does not run without layers")
    with caplog.at_level(logging.WARNING):
        encoder = make_encoder(tmp_path, family, lora_layers)
    assert encoder.frozen_layers == (None if family in UNSPLIT else 4 - lora_layers)
    assert ("cannot be split" in caplog.text) == (family in UNSPLIT)
    texts, factors = TEXTS[:12], moved_factors(encoder)
    plain, adapted = states_of(encoder, texts), states_of(encoder, texts, factors)
    assert max(state.shape[1] for state in plain) == 16, "some are cut"
    assert all((one - other)[-1].abs().max() > 0.01 for one, other in zip(plain, adapted, strict=True))
    for layers in ([0, 1, 2, 3, 4], [1, 4], [0, 2], [1], [3]):
        reader = TokenStateReader(encoder, layers)
        for given, expected in ((None, plain), (zero_start(encoder.factor_shapes, 0), plain), (factors, adapted)):
            assert_close(reader.read(texts, given).unpadded(), [states[layers] for states in expected], 2e-5)


@each_family
def test_tasks_carry_factors_of_their_own(family: str, tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path, family)
    reader, factors = TokenStateReader(encoder, [3, 4]), [moved_factors(encoder, seed) for seed in range(3)]
    row_task = torch.arange(len(TEXTS)) % 3
    together = {name: torch.stack([one[name] for one in factors]) for name in factors[0]}
    alone = [reader.read(TEXTS, one).unpadded() for one in factors]
    found = reader.read(TEXTS, together, row_task).unpadded()
    assert_close(found, [alone[task][row] for row, task in enumerate(row_task.tolist())], 2e-5)
    assert all((one - other).abs().max() > 0.01 for one, other in zip(alone[0], alone[1], strict=True))


@each_family
def test_second_derivatives_are_exact(family: str, tmp_path: Path) -> None:
    """The slope of |gradient|², along its own gradient, against a central difference in float64."""
    encoder = doubled(make_encoder(tmp_path, family))
    reader = TokenStateReader(encoder, [4])
    factors = {name: value.double() for name, value in moved_factors(encoder).items()}

    def squared_gradient(step: float, along: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = [(value + step * part).requires_grad_() for value, part in zip(factors.values(), along, strict=True)]
        with attention_by(plain_attention):
            states = reader.read(TEXTS[:6], dict(zip(factors, leaves, strict=True))).unpadded()
        loss = torch.stack([state.sin().mean() for state in states]).sum()
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum(), leaves

    found = torch.autograd.grad(*squared_gradient(0.0, list(factors.values())))
    norm = torch.cat([part.flatten() for part in found]).norm()
    # these compute a part (rotations, layer norm) in float32, whatever the rest is in
    h, tolerance = (1e-4, 2e-3) if family in ("modernbert", "eurobert", "deberta") else (1e-6, 1e-6)
    above, below = (squared_gradient(step, [part / norm for part in found])[0] for step in (h, -h))
    assert abs((above - below) / (2 * h) - norm) < tolerance * norm


def test_a_family_without_default_targets_says_what_there_is(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "megatron-bert")
    with pytest.raises(EncoderError, match=r"set lora targets to endings of these: encoder\.layer\.2"):
        Encoder(EncoderSettings(folder, max_length=32), LoraSettings(layers=2))
