import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel

from textmeta.errors import EncoderError, SettingsError
from textmeta.model.encoder import Encoder, EncoderSettings
from textmeta.model.lora import FactorLinear, LoraSettings, using_factors, zero_start

TEXTS = ["bal bel", "bil bol bul dal del", "dil", "dol dul fal fel fil fol ful"]


def random_factors(encoder: Encoder, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in encoder.factor_shapes.items()}


def test_factors_carry_the_names_and_the_arithmetic_of_peft(encoder: Encoder, tiny_model: str) -> None:
    factors = random_factors(encoder)
    peft_model = get_peft_model(AutoModel.from_pretrained(tiny_model), encoder.peft_config).eval()
    weights = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, value in factors.items():
            weights["base_model.model." + name.replace(".weight", ".default.weight")].copy_(value)
        inputs = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
        hidden = peft_model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    torch.testing.assert_close(encoder.features(encoder.prepare(TEXTS), factors), expected)


def test_zero_start_changes_nothing(encoder: Encoder, tiny_model: str) -> None:
    start = zero_start(encoder.factor_shapes, seed=0)
    plain = AutoModel.from_pretrained(tiny_model).eval()
    inputs = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = plain(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    torch.testing.assert_close(encoder.features(encoder.prepare(TEXTS), start), expected)


def test_zero_start_is_a_function_of_the_seed(encoder: Encoder) -> None:
    one, same, other = (zero_start(encoder.factor_shapes, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_each_task_gets_its_own_factors(encoder: Encoder) -> None:
    tasks = [random_factors(encoder, seed) for seed in range(3)]
    stacked = {name: torch.stack([task[name] for task in tasks]) for name in tasks[0]}
    row_task = torch.tensor([2, 0, 1, 0])
    together = encoder.features(encoder.prepare(TEXTS), stacked, row_task)
    for row, task in enumerate(row_task.tolist()):
        alone = encoder.features(encoder.prepare([TEXTS[row]]), tasks[task])
        torch.testing.assert_close(together[row], alone[0])


def test_threads_do_not_see_each_others_factors(encoder: Encoder) -> None:
    tasks = [random_factors(encoder, seed) for seed in range(4)]
    prepared = encoder.prepare(TEXTS)
    expected = [encoder.features(prepared, task) for task in tasks]
    wrong = []

    def work(number: int) -> None:
        for _ in range(30):
            if not torch.equal(encoder.features(prepared, tasks[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_factors_are_out_of_use_after_an_error() -> None:
    linear = FactorLinear("x", torch.nn.Parameter(torch.eye(2)))
    with pytest.raises(RuntimeError, match="stop"), using_factors({"x": torch.zeros(2, 2)}):
        raise RuntimeError("stop")
    assert torch.equal(linear(torch.ones(1, 1, 2)), torch.ones(1, 1, 2))


@pytest.mark.parametrize(("settings", "layers"), [(LoraSettings(), {2, 3}), (LoraSettings(layers=3), {1, 2, 3})])
def test_upper_layers_carry_lora(tiny_model: str, settings: LoraSettings, layers: set[int]) -> None:
    encoder = Encoder(EncoderSettings(tiny_model), settings)
    assert {int(name.split(".")[2]) for name in encoder.factor_shapes} == layers


def test_targets_can_be_chosen(tiny_model: str) -> None:
    encoder = Encoder(EncoderSettings(tiny_model), LoraSettings(targets=("intermediate.dense",)))
    assert {name.split(".")[3] for name in encoder.factor_shapes} == {"intermediate"}
    assert isinstance(encoder.peft_config, LoraConfig)


def test_unknown_targets_are_named_with_what_there_is(tiny_model: str) -> None:
    with pytest.raises(EncoderError, match=r"'nonsense'.*encoder\.layer\.2\.attention"):
        Encoder(EncoderSettings(tiny_model), LoraSettings(targets=("nonsense",)))


def test_too_many_layers_are_refused(tiny_model: str) -> None:
    with pytest.raises(SettingsError, match="layers is 9, but the encoder has 4"):
        Encoder(EncoderSettings(tiny_model), LoraSettings(layers=9))


def test_gradients_of_per_task_factors_are_the_same_bits_each_time() -> None:
    """With several threads: a sum whose order is left to chance would end a resumed run in another adapter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, 8, 16, generator=generator)
        weight = torch.randn(2, 384, 16, generator=generator, requires_grad=True)
        linear = FactorLinear("x", torch.nn.Parameter(torch.zeros(384, 16)))
        row_task = torch.randint(2, (200,), generator=generator)
        seen = []
        for _ in range(20):
            with using_factors({"x": weight}, row_task):
                seen.append(torch.autograd.grad(linear(x).square().sum(), weight)[0])
        assert all(torch.equal(gradient, seen[0]) for gradient in seen)
    finally:
        torch.set_num_threads(threads)
