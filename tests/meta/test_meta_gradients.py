"""Meta-gradients against central finite differences in float64, for everything that is learned.

The tests must be able to fail. Each of these changes was made to the code, and turned them red:

* ``create_graph=False`` in ``_differentiable_gradients``, that is, a detached inner gradient: MAML, Meta-SGD, ANIL;
* the squares that ``rms`` is made of detached in ``_directions``: the same three;
* the step sizes detached in ``gradient_steps``: these and FOMAML;
* the expanded start detached in ``adaptation_path``: FOMAML, MAML, Meta-SGD;
* the temperature detached in one of its two places in ``leave_one_out_logits``: MAML, Meta-SGD, ANIL;
* 1 in place of 0 for the root of 0 in ``_root``: MAML where a gradient is 0.

And :func:`test_the_check_tells_the_orders_apart` shows in every run that a first-order gradient does not pass for
MAML's, nor MAML's for FOMAML's stated formula.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.meta.test_adaptation import INNER, named, of_shots
from tests.meta.test_algorithms import start_for
from textmeta.data.corpus import Corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.meta import inner_loop
from textmeta.meta.adaptation import adaptation_path, query_logits, start_parameters, task_weights
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.meta_gradient import MetaGradientSettings
from textmeta.meta.tasks import query_batch, support_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import cross_entropy_per_task
from textmeta.model.initialisation import (
    EVIDENCE_SLOPES,
    LOG_STEP_SIZE,
    STRENGTH_PRIOR,
    TEMPERATURE_SLOPES,
    Parameters,
)

EXACT = ("protonet", "anil", "maml", "meta_sgd")
# a larger ε than elsewhere, so that the losses are smooth on the scale of a finite difference
SMOOTH = replace(INNER, lora_epsilon=1e-2, offset_epsilon=1e-2)
INNER_LOOPS: dict[str, InnerLoopSettings] = {
    "normalised": SMOOTH,
    "plain": replace(SMOOTH, normalise=False, lora_step_size=2.0, offset_step_size=0.5),
    "clipped": replace(SMOOTH, max_gradient_norm=0.1),
    "ridge": replace(SMOOTH, head="ridge"),
    "readout": replace(SMOOTH, head="readout"),
    "both factors": replace(SMOOTH, adapt=("lora_A", "lora_B", "offset")),
    "factors alone": replace(SMOOTH, adapt=("lora_B",)),
    "neighbours": replace(SMOOTH, adapt=("lora_A", "lora_B"), loss="neighbours"),
    "sizes per layer": replace(SMOOTH, step_sizes="layer"),
    "three steps": replace(SMOOTH, steps=3),
}
PLANS = {
    "kept": MetaGradientSettings(checkpointed=False),
    "checkpointed": MetaGradientSettings(checkpointed=True),
}


def tasks(corpus: Corpus) -> list[Episode]:
    """Two tasks of different ways and shots, one with a class of a single example, one with names."""
    episodes = EpisodeSampler(corpus, EpisodeSettings((2, 4), (1, 4), 3, unbalanced=True), seed=5).take(6)
    alone = next(e for e in episodes if 1 in np.bincount(e.support_labels) and max(np.bincount(e.support_labels)) > 2)
    other = next(e for e in episodes if e.ways != alone.ways)
    return [alone, named(other)]


# set by calibration, by no gradient
CALIBRATED = (TEMPERATURE_SLOPES, EVIDENCE_SLOPES, STRENGTH_PRIOR)


def objective(encoder: Encoder, parameters: Parameters, episodes: list[Episode], inner: InnerLoopSettings) -> float:
    """The function whose gradient an exact algorithm claims to return, by plain evaluation."""
    with torch.no_grad():
        support, query = support_batch(encoder, episodes), query_batch(encoder, episodes)
        *_, adapted = adaptation_path(encoder, parameters, support, inner)
        logits = query_logits(encoder, adapted, task_weights(encoder, adapted, support), query)
        return float(cross_entropy_per_task(logits, query.labels, query.labels >= 0).sum())


def central_difference(
    function: Callable[[Parameters], float], parameters: Parameters, key: str, along: Tensor, h: float
) -> float:
    """Fourth-order central difference of a function along a direction in one parameter."""
    values = {s: function({**parameters, key: parameters[key] + s * h * along}) for s in (-2, -1, 1, 2)}
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)


def relative_errors(
    function: Callable[[Parameters], float], parameters: Parameters, found: Parameters, h: float = 1e-4
) -> dict[str, float]:
    """For each parameter, along a random direction: |⟨gradient, direction⟩ - difference| over the gradient's norm."""
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for key, value in parameters.items():
        if not value.numel():
            continue
        if key in CALIBRATED:
            assert not found[key].any()
            continue
        along = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if found[key].any():  # half along the gradient, so that it is seen; half at random, so that what is missing is
            along = along / along.norm() + found[key] / found[key].norm()
        along /= along.norm()
        expected = central_difference(function, parameters, key, along, h)
        errors[key] = abs(float((found[key] * along).sum()) - expected) / max(float(found[key].norm()), 1e-4)
    return errors


def exact_errors(
    name: str, encoder: Encoder, episodes: list[Episode], inner: InnerLoopSettings, plan: MetaGradientSettings
) -> tuple[Parameters, dict[str, float]]:
    inner = ALGORITHMS[name].inner(inner)
    parameters = start_for(name, encoder, inner)
    found = ALGORITHMS[name].gradient(encoder, parameters, episodes, inner, plan).gradient
    return found, relative_errors(lambda p: objective(encoder, p, episodes, inner), parameters, found)


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        *(pytest.param("maml", inner, id=f"maml-{title}") for title, inner in INNER_LOOPS.items()),
        *(
            pytest.param(n, INNER_LOOPS[t], id=f"{n}-{t}")
            for n in EXACT
            for t in ("normalised", "ridge", "readout")
            if n != "maml"
        ),
    ],
)
def test_exact_algorithms(name: str, inner: InnerLoopSettings, encoder64: Encoder, corpus: Corpus) -> None:
    found, errors = exact_errors(name, encoder64, tasks(corpus), inner, MetaGradientSettings())
    assert max(errors.values()) < 1e-5, errors
    learned = {key: value for key, value in found.items() if value.numel() and key not in CALIBRATED}
    assert set(errors) == set(learned)
    assert all(value.norm() > 1e-4 for value in learned.values())  # nothing is compared with nothing


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["anil", "maml", "meta_sgd"])
def test_plans(name: str, plan: MetaGradientSettings, encoder64: Encoder, corpus: Corpus) -> None:
    _, errors = exact_errors(name, encoder64, tasks(corpus), SMOOTH, plan)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_rows_that_a_step_leaves_out(plan: MetaGradientSettings, encoder64: Encoder, corpus: Corpus) -> None:
    """A class that takes no part, a task in which none does, and one with more examples than a step is on."""
    episodes = [of_shots(corpus, shots, seed) for seed, shots in enumerate(([4, 4, 1], [5, 1, 1], [12, 11]))]
    _, errors = exact_errors("maml", encoder64, episodes, INNER_LOOPS["neighbours"], plan)
    assert max(errors.values()) < 1e-5, errors


def frozen_direction_errors(
    encoder: Encoder, episodes: list[Episode], constant_steps: int, found: Parameters, parameters: Parameters
) -> dict[str, float]:
    """Errors against the objective in which the directions of the first steps stay what they are at the parameters."""
    recorded: list[dict[str, Tensor]] = []
    original = inner_loop._directions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner_loop, "_directions", lambda *given: recorded.append(original(*given)) or recorded[-1])
        objective(encoder, parameters, episodes, SMOOTH)

        def held(values: Parameters) -> float:
            step = iter(range(SMOOTH.steps))

            def direction(*given: object) -> dict[str, Tensor]:
                number = next(step)
                return recorded[number] if number < constant_steps else original(*given)  # type: ignore[arg-type]

            patch.setattr(inner_loop, "_directions", direction)
            return objective(encoder, values, episodes, SMOOTH)

        return relative_errors(held, parameters, found)


@pytest.mark.parametrize(("name", "constant_steps"), [("fomaml", 2), ("maml", 1)])
def test_first_order_and_truncated(name: str, constant_steps: int, encoder64: Encoder, corpus: Corpus) -> None:
    """FOMAML's formula holds every ĝ constant; one second-order step of two holds the first."""
    episodes, parameters = tasks(corpus), start_for(name, encoder64, SMOOTH)
    plan = MetaGradientSettings(second_order_steps=SMOOTH.steps - constant_steps)
    found = ALGORITHMS[name].gradient(encoder64, parameters, episodes, SMOOTH, plan).gradient
    errors = frozen_direction_errors(encoder64, episodes, constant_steps, found, parameters)
    assert max(errors.values()) < 1e-5, errors
    assert all(found[key].norm() > 1e-4 for key in found if key.startswith(LOG_STEP_SIZE))


def test_the_check_tells_the_orders_apart(encoder64: Encoder, corpus: Corpus) -> None:
    episodes, parameters = tasks(corpus), start_for("maml", encoder64, SMOOTH)
    gradients = [
        ALGORITHMS["maml"].gradient(encoder64, parameters, episodes, SMOOTH, MetaGradientSettings(steps)).gradient
        for steps in (0, 1, 2)
    ]
    first, truncated, second = gradients
    for key, value in second.items():
        # the last entry of the offset's, the larger one, is the same in both orders
        if key not in (f"{LOG_STEP_SIZE}offset", *CALIBRATED):
            assert (first[key] - value).norm() > 0.01 * value.norm(), key
    for wrong in (first, truncated):
        as_maml = relative_errors(lambda p: objective(encoder64, p, episodes, SMOOTH), parameters, wrong)
        assert max(as_maml.values()) > 0.01
    as_fomaml = frozen_direction_errors(encoder64, episodes, 2, second, parameters)
    assert max(as_fomaml.values()) > 0.01


@pytest.mark.parametrize("clipped", [None, 0.1])
def test_where_a_gradient_is_zero(clipped: float | None, encoder64: Encoder, corpus: Corpus) -> None:
    """At LoRA's own start, B = 0, the gradient in A is exactly 0, but not its derivative in B."""
    inner = replace(SMOOTH, adapt=("lora_A", "lora_B", "offset"), lora_epsilon=0.1, max_gradient_norm=clipped)
    start = {
        key: value.double()
        for key, value in start_parameters(encoder64.factor_shapes, inner, encoder64.hidden_size).items()
    }
    episodes, plan = tasks(corpus), MetaGradientSettings()
    found = ALGORITHMS["maml"].gradient(encoder64, start, episodes, inner, plan).gradient
    errors = relative_errors(lambda p: objective(encoder64, p, episodes, inner), start, found, h=1e-5)
    assert max(errors.values()) < 1e-4, errors
