"""LoRA whose factors travel with the call: where it is put. Arithmetic: test_families; threads: test_algorithms."""

import pytest
import torch

from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LoraLinear, LoraSettings, layer_of, using_factors, zero_start
from textmeta.errors import EncoderError, SettingsError


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


def test_layer_of_a_factor() -> None:
    assert layer_of("encoder.layer.3.attention.self.query.lora_B.weight") == "encoder.layer.3"
    assert layer_of("layers.11.attn.Wqkv.lora_A.weight") == "layers.11"
    assert layer_of("head.lora_A.weight") == "head.lora_A.weight"
