"""The encoder: its settings, what is frozen, precision, what it says of a model it cannot use, LoRA and attention.

LoRA's arithmetic, and attention's, is in test_families.py; threads are in test_algorithms.py.
"""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.encoder.given import TEXTS, assert_close, moved_factors, save_family
from tests.given import Logged, Patch
from textmeta.encoder import encoder as module
from textmeta.encoder.attention import attention_by, plain_attention
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraLinear, LoraSettings, using_factors, zero_start
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import EncoderError, SettingsError


def test_what_an_encoder_says_of_itself(tiny_model: str, monkeypatch: Patch) -> None:
    monkeypatch.chdir(Path(tiny_model).parent)
    encoder = Encoder(EncoderSettings(Path(tiny_model).name, max_length=20), LoraSettings(layers=1))
    assert encoder.settings == EncoderSettings(tiny_model, max_length=20), "good from any folder"
    assert (encoder.hidden_size, encoder.total_layers, encoder.frozen_layers) == (32, 4, 3)
    assert (encoder.commit, encoder.source) == (None, (tiny_model, None))


def test_the_digest_is_of_the_transformer_without_lora(tiny_model: str, tmp_path: Path) -> None:
    one, two = (Encoder(EncoderSettings(tiny_model), LoraSettings(layers, rank=layers)) for layers in (1, 3))
    assert one.weights_sha256 == two.weights_sha256
    other = Encoder(EncoderSettings(save_family(tmp_path, "bert"), max_length=32))
    assert other.weights_sha256 != one.weights_sha256


def test_nothing_but_the_factors_gets_a_gradient(encoder: Encoder) -> None:
    for half in (encoder._prefix, encoder._suffix):
        assert not any(parameter.requires_grad for parameter in half.parameters())
        assert not half.training


def test_a_model_that_cannot_be_split_works_and_warns(encoder: Encoder, caplog: Logged, monkeypatch: Patch) -> None:
    class Wrong(torch.nn.Module):
        """Stands in for embeddings that add something of their own: the halves are not the whole."""

        def forward(self, *, inputs_embeds: Tensor, **_: object) -> Tensor:
            return inputs_embeds + 0.1

    monkeypatch.setattr(module, "_PassThrough", Wrong)
    with caplog.at_level(logging.WARNING):
        whole = Encoder(encoder.settings, encoder.lora)
    assert whole.frozen_layers is None
    assert "BertModel cannot be split" in caplog.text
    assert "not cached" in caplog.text
    found, expected = (TokenStateReader(one).read(TEXTS, moved_factors(one)).unpadded() for one in (whole, encoder))
    assert_close(found, expected)


def test_fp16_is_refused(tiny_model: str) -> None:
    with pytest.raises(SettingsError, match=r"'fp16': .*gradients vanish"):
        Encoder(EncoderSettings(tiny_model), precision="fp16")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no-such/model"):
        Encoder(EncoderSettings("no-such/model"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match="cannot load the encoder"):
        Encoder(EncoderSettings(str(tmp_path)))


@pytest.mark.parametrize(("family", "positions"), [("bert", 64), ("roberta", 62)])
def test_more_tokens_than_positions_are_refused(family: str, positions: int, tmp_path: Path) -> None:
    """RoBERTa's first positions are those of padding."""
    folder = save_family(tmp_path, family)
    encoder = Encoder(EncoderSettings(folder, max_length=positions))
    assert TokenStateReader(encoder).read([" ".join(TEXTS)]).batches[0].mask.shape == (1, positions)
    with pytest.raises(SettingsError, match=rf"max_length is {positions + 1}, but .* has {positions} positions"):
        Encoder(EncoderSettings(folder, max_length=positions + 1))


# LoRA whose factors travel with the call: where it is put


def test_zero_start_is_a_function_of_the_seed(encoder: Encoder) -> None:
    one, same, other = (zero_start(encoder.factor_shapes, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all((".lora_B." in name) == torch.equal(one[name], other[name]) for name in one)
    bound = 32**-0.5  # rows of A have 32 entries
    assert all(0.9 * bound < value.abs().max() <= bound for name, value in one.items() if ".lora_A." in name)


def test_factors_are_out_of_use_after_an_error() -> None:
    linear, x = LoraLinear(torch.nn.Linear(2, 2), "x", LoraSettings(rank=2)), torch.ones(1, 1, 2)
    factors = {name: torch.eye(2) for name in linear.names}
    plain = linear(x)
    with using_factors(factors):
        assert torch.allclose(linear(x), plain + 8)  # alpha / rank
    with pytest.raises(ZeroDivisionError), using_factors(factors):
        raise ZeroDivisionError
    assert torch.equal(linear(x), plain)


def test_gradients_of_per_task_factors_are_the_same_bits_each_time() -> None:
    """With several threads: a sum whose order is left to chance would end a resumed run in another adapter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, 8, 16, generator=generator)
        weight = torch.randn(2, 384, 16, generator=generator, requires_grad=True)
        linear = LoraLinear(torch.nn.Linear(16, 384), "x", LoraSettings(rank=16))
        names = linear.names
        row_task = torch.randint(2, (200,), generator=generator)
        seen = []
        for _ in range(20):
            with using_factors({names[0]: torch.eye(16), names[1]: weight}, row_task):
                seen.append(torch.autograd.grad(linear(x).square().sum(), weight)[0])
        assert all(torch.equal(gradient, seen[0]) for gradient in seen)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (LoraSettings(), {f"{n}.attention.self.{part}" for n in (2, 3) for part in ("query", "value")}),
        (LoraSettings(1, targets=("output.dense",)), {"3.attention.output.dense", "3.output.dense"}),
        (LoraSettings(3, targets=("intermediate.dense",)), {f"{n}.intermediate.dense" for n in (1, 2, 3)}),
    ],
)
def test_where_lora_is_put(tiny_model: str, settings: LoraSettings, names: set[str]) -> None:
    encoder = Encoder(EncoderSettings(tiny_model), settings)
    expected = {f"encoder.layer.{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    assert encoder.factor_shapes.keys() == expected
    assert all(shape[".lora_B." in name] == 8 for name, shape in encoder.factor_shapes.items()), "the rank"


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"targets": ("nonsense",)}, EncoderError, r"'nonsense'.*encoder\.layer\.2\.attention"),
        ({"layers": 9}, SettingsError, "layers is 9, but the encoder has 4"),
        ({"rank": 0}, SettingsError, "lora rank must be"),
        ({"alpha": 0}, SettingsError, "lora alpha must be"),
        ({"alpha": 10**400}, SettingsError, "lora alpha must be"),
        ({"layers": 0}, SettingsError, "lora layers must be"),
    ],
)
def test_settings_that_cannot_be_are_named(tiny_model: str, wrong: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Encoder(EncoderSettings(tiny_model), LoraSettings(**wrong))


def test_second_derivatives_exist_only_inside(encoder: Encoder) -> None:
    """Attention that can be differentiated twice does not outlive its block, nor an error in it."""
    reader, factors = TokenStateReader(encoder), moved_factors(encoder)

    def curvature() -> Tensor:
        leaves = {name: value.clone().requires_grad_() for name, value in factors.items()}
        loss = torch.cat([part.flatten() for part in reader.read(TEXTS[:2], leaves).unpadded()]).square().sum()
        gradients = torch.autograd.grad(loss, [*leaves.values()], create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in gradients), [*leaves.values()])[0]

    with attention_by(plain_attention):
        assert curvature().isfinite().all()
    with pytest.raises(RuntimeError, match="not implemented"):  # the fast kernels are back
        curvature()
    with pytest.raises(ZeroDivisionError), attention_by(plain_attention):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="not implemented"):  # after an error, too
        curvature()
