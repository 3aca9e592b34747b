"""What a classifier was fitted on, which it has to know to grow: kept in memory, stored as texts or as token states."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from textmeta.data.labels import checked_texts, few, is_word, readable_name, task_classes
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import AdapterError, DataError
from textmeta.meta.batch import text_order
from textmeta.meta.learner import TaskLearner

Example = tuple[str, Any, float]  # text, label, and weight, above 0


@dataclass(frozen=True, eq=False)
class FitInputs:
    """What ``fit`` was given, checked."""

    examples: tuple[Example, ...] = ()
    unlabelled: tuple[str, ...] = ()
    # of the classes, None where nothing is read; where labels are read, of those called otherwise or without examples
    names: Mapping[Any, str] | None = field(default_factory=dict)
    reads_labels: bool = True
    # (lower, length, d) of the frozen layers, by what stands in a text's place; none where the texts are there
    states: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def texts(self) -> list[str]:
        """All of them."""
        return [*(text for text, *_ in self.examples), *self.unlabelled]

    def classes(self, where: str = "fit") -> tuple[list[Any], list[str] | None]:
        """Return the classes, and their names in the same order, if there are any; DataError if they make no task."""
        labels, names = [label for _, label, _ in self.examples], self.names
        if self.reads_labels and names:
            names = {label: readable_name(label) for label in labels if is_word(label)} | dict(names)
        return task_classes(labels, "auto" if self.reads_labels and not names else names, where)

    def read_by(self, learner: TaskLearner) -> TaskLearner:
        """Return what learns from them, by the states that are there in the place of texts."""
        reader: Any = learner.reader
        return TaskLearner(reader.having(self.states), learner.adapter) if self.states else learner

    def as_states(self, reader: TokenStateReader) -> "FitInputs":
        """Return the same with token states in the place of texts."""
        new = list(dict.fromkeys(text for text in self.texts if text not in self.states))
        stand_in, states = {text: text for text in self.states}, dict(self.states)
        for text, state in zip(new, reader.frozen_states(new), strict=True):
            own = state.cpu().half()
            stand_in[text] = f"{text_order(text):08x}{hashlib.sha256(own.numpy().tobytes()).hexdigest()}"
            states[stand_in[text]] = own
        examples = tuple((stand_in[text], label, weight) for text, label, weight in self.examples)
        unlabelled = tuple(stand_in[text] for text in self.unlabelled)
        kept = {stand_in[text]: states[stand_in[text]] for text in self.texts}  # a class may have been removed
        return replace(self, examples=examples, unlabelled=unlabelled, states=kept)


class Strict(BaseModel):
    """JSON of which every member is known and of exactly the type that is declared."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StoredSupport(Strict):
    """What ``classifier.json`` holds of it."""

    kind: Literal["states", "texts"]
    examples: list[tuple[str, Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0, allow_inf_nan=False)]]]
    unlabelled: list[str]
    names: list[str | None] | None  # of each class
    reads_labels: bool


def stored_support(inputs: FitInputs, classes: Sequence[Any]) -> dict[str, Any]:
    """Return what is stored as JSON; ``classes`` are those of the fitted task."""
    numbers = {label: number for number, label in enumerate(classes)}
    return {
        "kind": "states" if inputs.states else "texts",
        "examples": [(text, numbers[label], weight) for text, label, weight in inputs.examples],
        "unlabelled": inputs.unlabelled,
        "names": None if inputs.names is None else [inputs.names.get(label) for label in classes],
        "reads_labels": inputs.reads_labels,
    }


def read_support(
    stored: StoredSupport, states: Mapping[str, Tensor], classes: Sequence[Any], hidden: int, path: Path
) -> FitInputs:
    """Return what :func:`stored_support` was given, by what is stored as JSON and the (…, d) states beside it.

    AdapterError, naming the path, if the examples are not of a task with these classes, or the states not of them.
    """
    try:
        names = None if stored.names is None else zip(classes, stored.names, strict=True)
        inputs = FitInputs(
            tuple((text, classes[number], weight) for text, number, weight in stored.examples),
            tuple(stored.unlabelled),
            None if names is None else {label: name for label, name in names if name is not None},
            stored.reads_labels,
            states,
        )
        checked_texts(inputs.texts, "texts")
        if inputs.classes()[0] != list(classes):
            raise DataError(f"it is not what the classes {few(classes)} were fitted on")
        expected = set(inputs.texts) if stored.kind == "states" else set()
        shaped = all(value.ndim == 3 and value.shape[2] == hidden and value.numel() for value in states.values())
        if states.keys() != expected or not shaped:
            raise DataError(f"expected (layers, length, {hidden}) states of {len(expected)} texts beside it")
    except (DataError, IndexError, ValueError) as error:
        raise AdapterError(f"{path}: support: {error}") from error
    return inputs
