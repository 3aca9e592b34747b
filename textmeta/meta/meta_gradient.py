"""How a meta-gradient is taken."""

from dataclasses import dataclass

from textmeta.errors import SettingsError

__all__ = ["MetaGradientSettings"]

KEPT_TEXTS = 512  # texts, times inner steps, whose activations are kept for the second order


@dataclass(frozen=True)
class MetaGradientSettings:
    """How a meta-gradient is taken.

    Args:
        second_order_steps: of MAML, Meta-SGD and ANIL: only the last so many inner steps are differentiated through
            (truncated); null for all. FOMAML, Reptile and ProtoNet differentiate through none.
        checkpointed: compute inner steps that are differentiated through again in the backward pass: memory then hardly
            grows with their number, time by about half. By default where steps times support texts pass 512. The
            result does not depend on it, but for rounding.
        texts_at_once: support and query texts of the tasks that go through the encoder together; further tasks come
            after these, to the same sum, and a larger task goes alone. Lower it when memory runs out. The result does
            not depend on it, but for rounding; a run can go on with another value.
    """

    second_order_steps: int | None = None
    checkpointed: bool | None = None
    texts_at_once: int = 2048

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.second_order_steps is not None and self.second_order_steps < 0:
            raise SettingsError(
                f"meta_gradient second_order_steps must not be negative, given {self.second_order_steps}"
            )
        if self.texts_at_once < 1:
            raise SettingsError(f"meta_gradient texts_at_once must be at least 1, given {self.texts_at_once}")

    def saves_memory(self, texts: int, steps: int) -> bool:
        """Return whether to checkpoint so many steps, differentiated through, on so many support texts."""
        return texts * steps > KEPT_TEXTS if self.checkpointed is None else self.checkpointed
