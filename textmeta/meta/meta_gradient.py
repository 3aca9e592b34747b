"""How a meta-gradient is taken, and how that changes as training goes on."""

from dataclasses import dataclass

from textmeta.errors import SettingsError

__all__ = ["MetaGradientPlan", "MetaGradientSettings"]

KEPT_TEXTS = 512  # texts, times inner steps, whose activations are kept for the second order


@dataclass(frozen=True)
class MetaGradientPlan:
    """How the meta-gradient of one outer step is taken.

    Args:
        second_order_steps: the last so many inner steps are differentiated through; null for all. An algorithm that is
            first order by definition takes none.
        multi_step_share: share of the query loss that is spread evenly over the parameters after each inner step, the
            rest being on the last (the multi-step loss of MAML++).
        checkpointed: whether inner steps that are differentiated through are computed again in the backward pass; null
            for: if they have many texts.
        texts_at_once: support and query texts of the tasks that go through the encoder together; further tasks come
            after these, to the same sum. A larger task goes alone.
    """

    second_order_steps: int | None = None
    multi_step_share: float = 0.0
    checkpointed: bool | None = None
    texts_at_once: int = 2048

    def saves_memory(self, texts: int, steps: int) -> bool:
        """Return whether to checkpoint so many steps, differentiated through, on so many support texts."""
        return texts * steps > KEPT_TEXTS if self.checkpointed is None else self.checkpointed

    def loss_weights(self, steps: int) -> list[float]:
        """Return the weights of the query loss after 0, 1, …, ``steps`` inner steps; their sum is 1."""
        if steps == 0:
            return [1.0]
        each = self.multi_step_share / steps
        return [0.0, *[each] * (steps - 1), each + 1 - self.multi_step_share]


@dataclass(frozen=True)
class MetaGradientSettings:
    """How meta-gradients are taken over a training run.

    Args:
        second_order_steps: of MAML, Meta-SGD and ANIL: only the last so many inner steps are differentiated through
            (truncated); null for all. FOMAML, Reptile and ProtoNet differentiate through none.
        first_order_until: outer steps that are first order before the second order begins: the derivative-order
            annealing of MAML++ (Antoniou et al., 2019, "How to train your MAML", section 4).
        multi_step_until: outer steps over which the query loss counts after every inner step, evenly at first and less
            and less, before the last one's alone counts: the multi-step loss of MAML++ (eq. 4 there). Each inner step
            then costs a pass over support and queries more. Not for Reptile and ProtoNet.
        checkpointed: compute inner steps that are differentiated through again in the backward pass: memory then hardly
            grows with their number, time by about half. By default where steps times support texts pass 512. The
            result does not depend on it, but for rounding.
        texts_at_once: support and query texts of the tasks that go through the encoder together; lower it when memory
            runs out. The result does not depend on it, but for rounding; a run can go on with another value.
    """

    second_order_steps: int | None = None
    first_order_until: int = 0
    multi_step_until: int = 0
    checkpointed: bool | None = None
    texts_at_once: int = 2048

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("second_order_steps", "first_order_until", "multi_step_until"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SettingsError(f"meta_gradient {name} must not be negative, given {value}")
        if self.texts_at_once < 1:
            raise SettingsError(f"meta_gradient texts_at_once must be at least 1, given {self.texts_at_once}")

    def at(self, step: int) -> MetaGradientPlan:
        """Return the plan of an outer step, counted from 0."""
        return MetaGradientPlan(
            second_order_steps=0 if step < self.first_order_until else self.second_order_steps,
            multi_step_share=max(0.0, 1 - step / self.multi_step_until) if self.multi_step_until else 0.0,
            checkpointed=self.checkpointed,
            texts_at_once=self.texts_at_once,
        )
