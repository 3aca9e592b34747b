"""Learning a task: from the token states of its support set to all that its queries are classified by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from textmeta.encoder.token_states import TokenStates
from textmeta.heads.common import Examples, log_shots, temperature
from textmeta.heads.evidence import Folds, fold_nll, folds_of, left_out_scores, mixture
from textmeta.heads.names import name_evidence, name_gate, name_scores
from textmeta.heads.neighbours import neighbourhood_loss
from textmeta.heads.pooling import centre, centred, pool, with_unlabelled_centre
from textmeta.heads.prototype import prototypes
from textmeta.heads.ridge import ridge
from textmeta.heads.scope import scope_inputs
from textmeta.heads.unlabelled import soft_labelled_ridge, unlabelled_weight
from textmeta.meta.batch import Rows, TaskBatch
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.inner_loop import inner_steps
from textmeta.model.initialisation import layer_of

__all__ = ["GroupStates", "LearnedTasks", "Reader", "TaskLearner", "rows_in_turn"]

MOST_ROWS, MOST_CLASSES = 128, 64  # of a task in one inner step: memory stays bounded
GRADIENT_EPSILON = 1e-4
QUERIES, FACTOR = "queries", "lora."


class Reader(Protocol):
    """What gives the token states of texts: :class:`~textmeta.encoder.token_states.TokenStateReader`, or a cache."""

    def read(
        self, texts: Sequence[str], factors: Mapping[str, Tensor] | None = None, row_task: Tensor | None = None
    ) -> TokenStates:
        """Return the token states of texts, with LoRA's factors, (out, in), or (tasks, out, in) for one set a task."""


@dataclass(frozen=True)
class GroupStates:
    """Token states of the texts of a :class:`~textmeta.meta.batch.TaskBatch`, and of its queries where it has any."""

    support: TokenStates
    names: TokenStates
    unlabelled: TokenStates
    queries: TokenStates


@dataclass(frozen=True)
class LearnedTasks:
    """All that queries of T tasks are classified by; no support text, nor its states, is in it.

    Args:
        queries: (T, V, d) pooling queries after the steps; the initial ones at (V, d) where no task took any.
        centre: (T, V, d) of texts pooled so.
        weights: (T, V, d, C): a text's scores are Σ_v z_v · W_v.
        scale: (T,) temperature t of these scores; 0 where there is nothing to regress on.
        names: (T, C, V, d) centred views of the names, 0 where a task has none.
        name_centre: (T, V, d), the centre of texts that names are compared with, pooled by the initial queries.
        name_scale: (T,) factor on the cosines to names; 0 where a task has none.
        class_means: (T, V, d, C) prototypes, for the scope.
        mixture: (T, V).
        classes: (T, C) bool, those that a task has.
        present: (T, C) bool, those that have examples.
        nll: (T,) of the mixture, of left-out examples before the steps.
        view_nll: (T, V) of each view, likewise.
        name_evidence: (T,) E.
        shots: (T,) log(1 + k).
        factors: LoRA's, shared or one set a task.
    """

    queries: Tensor
    centre: Tensor
    weights: Tensor
    scale: Tensor
    names: Tensor
    name_centre: Tensor
    name_scale: Tensor
    class_means: Tensor
    mixture: Tensor
    classes: Tensor
    present: Tensor
    nll: Tensor
    view_nll: Tensor
    name_evidence: Tensor
    shots: Tensor
    factors: Mapping[str, Tensor]


class TaskLearner:
    """Learns tasks from their support sets, and classifies their queries.

    Args:
        reader: gives token states.
        initialisation: where tasks start.
        settings: how they are learned; ``steps`` at most those of the initialisation.
        rounds: of soft labels for unlabelled texts, which the ridge takes; 0 lets them move the centre alone.
    """

    def __init__(
        self, reader: Reader, initialisation: Initialisation, settings: LearnerSettings, rounds: int = 3
    ) -> None:
        self.reader = reader
        self.initialisation = initialisation
        self.settings = settings
        self.rounds = rounds

    def read(self, batch: TaskBatch, queries: Rows, factors: Mapping[str, Tensor] | None = None) -> GroupStates:
        """Read all texts of a batch together.

        Args:
            batch: T tasks.
            queries: their queries.
            factors: LoRA's, where tasks have their own, (T, out, in); by default the initial ones.
        """
        groups = (batch.support, batch.names, batch.unlabelled, queries)
        row_task = None if factors is None else torch.cat([group.row_task for group in groups])
        states = self.reader.read(
            [text for group in groups for text in group.texts],
            self.initialisation.lora if factors is None else factors,
            row_task,
        )
        parts, first = [], 0
        for group in groups:
            rows = torch.arange(first, first + len(group.texts), device=group.row_task.device)
            parts.append(states.where(rows))
            first += len(group.texts)
        return GroupStates(*parts)

    def learn(self, batch: TaskBatch, states: GroupStates, second_order: bool = False) -> LearnedTasks:
        """Learn T tasks.

        Args:
            batch: the tasks.
            states: of its texts.
            second_order: whether to differentiate through the gradients of the inner steps; else these are constants.
        """
        init = self.initialisation
        first = pool(states.support, init.queries)  # (N, V, d)
        views = batch.support.pad(first)
        examples = Examples.of(batch.labels, batch.ways, views.dtype)
        shots = log_shots(examples)
        folds = folds_of(examples)
        view_nll, nll, mixed = self._evidence(views, folds)

        queries, factors, stepped = self._take_steps(batch, states, examples, second_order)
        if factors is not None:
            states = self.read(batch, Rows.of([()] * len(batch.ways), batch.ways.device), factors)
            first = pool(states.support, init.queries)
        row_task = batch.support.row_task if queries.ndim == 3 else None
        views = batch.support.pad(first if row_task is None else pool(states.support, queries, row_task))
        if self.settings.evidence == "after" and row_task is not None:
            _, _, mixed = self._evidence(views, folds)
        strength = init.log_centre_strength.exp()
        middle = centre(views, examples, init.centre, strength)
        extra = batch.unlabelled if batch.unlabelled.texts else None
        if extra is not None:
            there = extra.there.to(views.dtype)
            share, number = init.log_unlabelled_share.exp(), examples.total + strength
            own = extra.pad(pool(states.unlabelled, queries, None if row_task is None else extra.row_task))
            middle = with_unlabelled_centre(middle, number, own, there, share)
        support = centred(views, middle)
        make = {"ridge": self._ridge, "prototype": prototypes}[self.settings.head]
        weights = make(support, mixed, examples)
        scale = temperature(init.temperature, shots, batch.ways, stepped, nll)

        names, name_middle, name_scale, told = self._names(batch, states, examples, first, folds)
        if extra is not None and self.rounds and self.settings.head == "ridge":
            name_logits: Tensor | float = 0.0
            if batch.names.texts:
                at_start = extra.pad(pool(states.unlabelled, init.queries))
                scores = name_scores(centred(at_start, name_middle), names, init.name_view_weights.softmax(0))
                name_logits = name_scale[:, None, None] * scores
            z = centred(own, middle)
            weights = soft_labelled_ridge(
                weights,
                support,
                z,
                there,
                mixed,
                examples,
                init.log_penalty.exp(),
                unlabelled_weight(init.unlabelled_weight, shots, examples, there.sum(1)),
                lambda w: scale[:, None, None] * torch.einsum("trvd,tvdc->trc", z, w) + name_logits,
                self.rounds,
            )
        return LearnedTasks(
            queries,
            middle,
            weights,
            scale,
            names,
            name_middle,
            name_scale,
            prototypes(support, mixed, examples),
            mixed,
            examples.classes,
            examples.present,
            nll,
            view_nll,
            told,
            shots,
            init.lora if factors is None else factors,
        )

    def logits(self, learned: LearnedTasks, rows: Rows, states: TokenStates) -> Tensor:
        """Return (T, n, C) logits of queries, -inf for classes that a task does not have.

        Args:
            learned: T tasks.
            rows: their queries.
            states: of these, read with the factors that were learned.
        """
        z, names = self._query_scores(learned, rows, states)
        scores = torch.einsum("tnvd,tvdc->tnc", z, learned.weights)
        logits = learned.scale[:, None, None] * scores + learned.name_scale[:, None, None] * names
        return logits.masked_fill(~learned.classes[:, None], -torch.inf)

    def scope_inputs(self, learned: LearnedTasks, rows: Rows, states: TokenStates) -> Tensor:
        """Return (T, n, 7) what the scope of queries is told by (:data:`~textmeta.heads.scope.SCOPE_INPUTS`)."""
        z, names = self._query_scores(learned, rows, states)
        to_means = torch.einsum("tnvd,tvdc->tnc", z, learned.class_means)
        has_names = learned.name_scale > 0
        return scope_inputs(
            self.logits(learned, rows, states),
            to_means.masked_fill(~learned.present[:, None], -torch.inf),
            names.masked_fill(~(learned.classes & has_names[:, None])[:, None], -torch.inf),
            has_names,
            learned.nll,
            learned.shots,
            learned.classes.sum(1),
        )

    def _query_scores(self, learned: LearnedTasks, rows: Rows, states: TokenStates) -> tuple[Tensor, Tensor]:
        """Return the centred views (T, n, V, d) of queries, and their cosines (T, n, C) to the names."""
        init = self.initialisation
        own = pool(states, learned.queries, rows.row_task if learned.queries.ndim == 3 else None)
        z = centred(rows.pad(own), learned.centre)
        if not learned.name_scale.any():
            return z, z.new_zeros(*z.shape[:2], learned.classes.shape[1])
        first = own if learned.queries.ndim == 2 else pool(states, init.queries)
        at_start = centred(rows.pad(first), learned.name_centre)
        return z, name_scores(at_start, learned.names, init.name_view_weights.softmax(0))

    def _ridge(self, support: Tensor, mixed: Tensor, examples: Examples) -> Tensor:
        return ridge(support, mixed, examples, self.initialisation.log_penalty.exp())

    def _evidence(self, views: Tensor, folds: Folds) -> tuple[Tensor, Tensor, Tensor]:
        """Return NLL of each view (T, V), NLL of their mixture (T,), and the mixture (T, V)."""
        init = self.initialisation
        scale = init.log_evidence_scale.exp()

        def nll_of(mixed: Tensor | None) -> Tensor:
            if not folds.any.any():
                chance = folds.examples.classes.sum(1, keepdim=True).to(views).log()
                return chance.expand(-1, views.shape[2] if mixed is None else 1)
            numbers = (init.centre, init.log_centre_strength.exp(), init.log_penalty.exp())
            return fold_nll(left_out_scores(views, folds, *numbers, mixed), folds, scale)

        view_nll = nll_of(None)
        strength, half = init.log_evidence_strength.exp(), init.log_evidence_half.exp()
        mixed = mixture(init.view_prior, strength, half, view_nll, folds)
        return view_nll, nll_of(mixed)[:, 0], mixed

    def _names(
        self, batch: TaskBatch, states: GroupStates, examples: Examples, first: Tensor, folds: Folds
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return centred names (T, C, V, d), the centre of texts (T, V, d), names' scale and evidence (T,)."""
        init = self.initialisation
        views = batch.support.pad(first)
        strength = init.log_centre_strength.exp()
        middle = centre(views, examples, init.centre, strength)
        nothing = views.new_zeros(len(batch.ways))
        if not batch.names.texts:
            return views.new_zeros(*examples.classes.shape, *views.shape[2:]), middle, nothing, nothing
        if batch.unlabelled.texts:
            extra = batch.unlabelled
            middle = with_unlabelled_centre(
                middle,
                examples.total + strength,
                extra.pad(pool(states.unlabelled, init.queries)),
                extra.there.to(views.dtype),
                init.log_unlabelled_share.exp(),
            )
        rows = batch.names.widened(examples.classes.shape[1])
        named = rows.there.any(1)
        names = rows.pad(pool(states.names, init.queries))
        # every name is a class of its own
        numbers = torch.arange(rows.there.shape[1], device=rows.there.device)
        own = Examples.of(torch.where(rows.there, numbers, -1), batch.ways, names.dtype)
        name_strength = init.log_name_centre_strength.exp()
        names = centred(names, centre(names, own, init.name_centre, name_strength))
        names = names * rows.there[..., None, None]
        scale = init.log_name_scale.exp()
        scores = name_scores(centred(views, middle), names, init.name_view_weights.softmax(0))
        evidence = torch.where(named, name_evidence(scale * scores, examples), 0.0)
        several = examples.present.sum(1) >= 2
        factor = torch.where(
            several, name_gate(init.name_gate, evidence, examples) * scale, init.log_zero_shot_scale.exp()
        )
        return names, middle, torch.where(named, factor, 0.0), evidence

    def _take_steps(
        self, batch: TaskBatch, states: GroupStates, examples: Examples, second_order: bool
    ) -> tuple[Tensor, dict[str, Tensor] | None, Tensor]:
        """Return pooling queries, LoRA's factors if they were adapted, and (T,) whether a task took steps."""
        init, settings = self.initialisation, self.settings
        counts = examples.member.sum(1)
        can_learn = (counts >= 2).sum(1) >= 2
        steps = 0 if settings.adapt == "none" else settings.steps
        if not steps or not can_learn.any():
            return init.queries, None, torch.zeros_like(can_learn)
        tasks = len(batch.ways)
        with_lora = "lora" in settings.adapt
        start: dict[str, Tensor] = {}
        if "pooling" in settings.adapt:
            start[QUERIES] = init.queries.expand(tasks, -1, -1)
        if with_lora:
            adapted = {name: value for name, value in init.lora.items() if ".lora_B." in name}
            start |= {FACTOR + name: value.expand(tasks, -1, -1) for name, value in adapted.items()}
        scale, weights = init.loss_log_scale.exp(), init.loss_view_weights.softmax(0)
        parts = _parts(batch, examples, steps)

        def loss(step: int, tensors: Mapping[str, Tensor]) -> Tensor:
            rows, labels, chosen = parts[step]
            if with_lora:
                factors = {name: tensors.get(FACTOR + name, value) for name, value in init.lora.items()}
                own = self.reader.read(rows.texts, factors, rows.row_task)
            else:
                own = states.support if chosen is None else states.support.where(chosen)
            queries = tensors.get(QUERIES)
            pooled = pool(own, init.queries) if queries is None else pool(own, queries, rows.row_task)
            views = rows.pad(pooled)
            return neighbourhood_loss(views, Examples.of(labels, batch.ways, views.dtype), weights, scale)

        chance = [Examples.of(labels, batch.ways, scale.dtype).number.clamp(min=2).log() for _, labels, _ in parts]
        size = log_shots(examples)
        gate = torch.sigmoid(init.step_gate[0] + init.step_gate[1] * size)  # (T,)
        pull = torch.sigmoid(init.pull)
        origin = {**start}

        def update(
            step: int, fast: Mapping[str, Tensor], gradients: Mapping[str, Tensor], losses: Tensor
        ) -> dict[str, Tensor]:
            far = gate * (losses / chance[step].to(losses)).clamp(max=1.0)  # (T,)
            moved = {}
            for name, value in fast.items():
                # one root mean square a task and view, or a task and factor
                axes = -1 if name == QUERIES else (-2, -1)
                square = gradients[name].square().mean(axes, keepdim=True)
                direction = gradients[name] * (square + GRADIENT_EPSILON**2).rsqrt()
                size = self._step_sizes(name)[step].exp()
                size = size if size.ndim == 2 else size[..., None] if name == QUERIES else size
                moved[name] = value - far[:, None, None] * size * direction - pull * (value - origin[name])
            return moved

        *_, last = inner_steps(
            loss, start, {}, update, steps, second_order_steps=steps if second_order else 0, checkpointed=False
        )
        kept = can_learn[:, None, None]
        queries = torch.where(kept, last[QUERIES], start[QUERIES]) if QUERIES in last else init.queries
        if not with_lora:
            return queries, None, can_learn
        factors = {name: last.get(FACTOR + name, value) for name, value in init.lora.items()}
        return queries, factors, can_learn

    def _step_sizes(self, name: str) -> Tensor:
        """Return the log step sizes (J, …) of the pooling queries, or (J,) of a LoRA factor."""
        init = self.initialisation
        if name == QUERIES:
            return init.log_step_sizes
        layers = sorted({layer_of(factor) for factor in init.lora}, key=lambda layer: int(layer.rsplit(".", 1)[1]))
        return init.lora_log_step_sizes[:, layers.index(layer_of(name.removeprefix(FACTOR)))]


def _parts(batch: TaskBatch, examples: Examples, steps: int) -> list[tuple[Rows, Tensor, Tensor | None]]:
    """Return of each step its support rows, their labels (T, m), and their numbers (M,) among all, None for all."""
    rows = batch.support
    if int(rows.there.sum(1).max()) <= MOST_ROWS:
        return [(rows, batch.labels, None)] * steps
    parts: list[tuple[Rows, Tensor, Tensor | None]] = []
    for step in range(steps):
        kept = rows_in_turn(examples, step)
        chosen = kept[rows.row_task, rows.place].nonzero()[:, 0]
        numbers = chosen.tolist()
        there = torch.arange(int(kept.sum(1).max()), device=kept.device) < kept.sum(1, keepdim=True)
        place = (kept.cumsum(1) - 1)[rows.row_task[chosen], rows.place[chosen]]
        own = Rows(tuple(rows.texts[i] for i in numbers), rows.row_task[chosen], place, there)
        parts.append((own, own.pad(batch.labels[rows.row_task[chosen], rows.place[chosen]] + 1) - 1, chosen))
    return parts


def rows_in_turn(examples: Examples, step: int) -> Tensor:
    """Choose the support rows of one inner step: all of a small task; classes and their texts in turn of a large one.

    Of a task with more than 128 texts a step sees at most 64 classes of two texts or more, at least two texts of each,
    and about 128 texts in all.

    Args:
        examples: of the T tasks.
        step: its number; each sees the next classes, and of a class the next texts.

    Returns:
        (T, n) bool.
    """
    member = examples.member
    counts = member.sum(1)  # (T, C)
    there = member.sum(-1) > 0
    several = counts >= 2
    number = several.sum(1).clamp(min=1)  # classes to choose from
    # classes in the order of their first text, which does not depend on how they are numbered
    first = torch.where(several, member.argmax(1), member.shape[1])
    rank = first.argsort(1).argsort(1)
    take = number.clamp(max=MOST_CLASSES)
    turns = [several & ((rank - s * take[:, None]) % number[:, None] < take[:, None]) for s in range(step + 1)]
    chosen, before = turns[-1], torch.stack(turns).sum(0) - turns[-1].long()  # how often a class had its turn
    each = (MOST_ROWS // take).clamp(min=2)
    position = ((member.cumsum(1) - member) * member).sum(-1).long()
    own = member.argmax(-1)
    size = counts.gather(1, own).long().clamp(min=1)
    in_turn = (position - before.gather(1, own) * each[:, None]) % size < each[:, None]
    large = (there.sum(1) > MOST_ROWS)[:, None]
    return there & (~large | (chosen.gather(1, own) & in_turn))
