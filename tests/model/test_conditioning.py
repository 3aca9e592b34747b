"""What the task embedding decides, against the formulas written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from textmeta.errors import SettingsError
from textmeta.model.conditioning import (
    BANK,
    GATES,
    KEYS,
    TASK_TEMPERATURE,
    ConditioningSettings,
    conditioned_factors,
    conditioned_temperature,
    conditioning_shapes,
    conditioning_start,
    routing,
)
from textmeta.model.initialisation import LOG_TEMPERATURE, LORA
from textmeta.model.task_encoder import TaskEncoderSettings

SMALL = TaskEncoderSettings(size=6, width=8)
# more than nine layers: in the order of their numbers, not of their letters
SHAPES: dict[str, tuple[int, ...]] = {
    f"encoder.layer.{layer}.attention.{part}.lora_{factor}.weight": (2, 5) if factor == "A" else (5, 2)
    for layer in (8, 9, 10, 11)
    for part in ("query", "value")
    for factor in "AB"
}


def parameters_of(settings: ConditioningSettings) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lora = {LORA + name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    moved = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in conditioning_start(settings, SHAPES, 12).items()
    }
    return {**lora, **moved, LOG_TEMPERATURE: torch.tensor(2.3)}


def embeddings(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(torch.randn(count, 6, generator=generator), dim=1)


@pytest.mark.parametrize("groups", [1, 2, 3, 9])
def test_banks(groups: int) -> None:
    parameters = parameters_of(ConditioningSettings("banks", banks=3, groups=groups, task_encoder=SMALL))
    z = embeddings()
    found = conditioned_factors(parameters, z)
    assert set(found) == {name for name in SHAPES if "lora_B" in name}
    keys = parameters[KEYS].double().numpy()
    assert len(keys) == min(groups, 4)
    for task in range(3):
        for name, factor in found.items():
            layer = int(name.split(".")[2]) - 8
            scores = keys[layer * len(keys) // 4] @ z[task].double().numpy()
            share = np.exp(scores) / np.exp(scores).sum()
            banks = parameters[BANK + name].double().numpy()
            expected = parameters[LORA + name].double().numpy() + sum((share[k] - 1 / 3) * banks[k] for k in range(3))
            np.testing.assert_allclose(factor[task].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_even_routing_is_the_unconditioned_start() -> None:
    parameters = parameters_of(ConditioningSettings("banks", task_encoder=SMALL))
    parameters[KEYS] = torch.ones_like(parameters[KEYS])
    torch.testing.assert_close(routing(parameters, embeddings()), torch.full((3, 3, 4), 0.25))
    for name, factor in conditioned_factors(parameters, embeddings()).items():
        torch.testing.assert_close(factor, parameters[LORA + name].expand(3, 5, 2))


def test_gates() -> None:
    parameters = parameters_of(ConditioningSettings("gates", task_encoder=SMALL))
    z = embeddings()
    for name, factor in conditioned_factors(parameters, z).items():
        gate = 1 + np.tanh(z.numpy() @ parameters[GATES][int(name.split(".")[2]) - 8].numpy())
        np.testing.assert_allclose(factor, gate[:, None, None] * parameters[LORA + name].numpy(), rtol=1e-5)


def test_temperature() -> None:
    parameters = parameters_of(ConditioningSettings("none", temperature=True, task_encoder=SMALL))
    z, statistics = embeddings(), torch.randn(3, 5, generator=torch.Generator().manual_seed(6))
    expected = np.exp(2.3 + np.concatenate([z, statistics], 1) @ parameters[TASK_TEMPERATURE].numpy())
    np.testing.assert_allclose(conditioned_temperature(parameters, z, statistics), expected, rtol=1e-5)
    assert conditioned_factors(parameters, z) == {}
    del parameters[TASK_TEMPERATURE]
    assert conditioned_temperature(parameters, z, statistics).shape == ()


@pytest.mark.parametrize("start", ["none", "banks", "gates"])
@pytest.mark.parametrize("temperature", [False, True])
def test_the_shapes_are_those_of_the_start(start: str, temperature: bool) -> None:
    settings = ConditioningSettings(start, temperature=temperature, task_encoder=SMALL)  # type: ignore[arg-type]
    made = conditioning_start(settings, SHAPES, 12, seed=3)
    assert {name: tuple(value.shape) for name, value in made.items()} == conditioning_shapes(settings, SHAPES, 12)
    again = conditioning_start(settings, SHAPES, 12, seed=3)
    assert all(torch.equal(value, again[name]) for name, value in made.items())
    assert not all(torch.equal(value, made[name]) for name, value in conditioning_start(settings, SHAPES, 12).items())


def test_nothing_that_must_learn_starts_without_a_gradient() -> None:
    """With U = 0 neither keys nor task encoder would ever move."""
    made = conditioning_start(ConditioningSettings("banks", task_encoder=SMALL), SHAPES, 12)
    assert all(value.std() > 0 for name, value in made.items() if name.startswith(BANK))
    assert routing(made, embeddings()).std() > 0.01


@pytest.mark.parametrize(
    ("given", "message"),
    [({"start": "all"}, "start must be"), ({"banks": 0}, "banks must be"), ({"groups": 1000}, "groups")],
)
def test_settings_out_of_range(given: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ConditioningSettings(**given)


@pytest.mark.parametrize("layer", ["encoder.\u00b2.3", "encoder.layer." + "9" * 5000])
def test_names_of_layers_may_be_anybodys(layer: str) -> None:
    shapes = {f"{layer}.{part}.lora_B.weight": (5, 2) for part in ("query", "value")}
    settings = ConditioningSettings("gates", task_encoder=SMALL)
    assert conditioning_shapes(settings, shapes, 12)[GATES][1] == 6
