"""Learning a task: from the token states of its support set to all that its queries are classified by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from textmeta.data.episodes import Episode
from textmeta.encoder.token_states import TokenStates
from textmeta.heads.common import Examples, log_shots, temperature
from textmeta.heads.evidence import Folds, fold_nll, folds_of, left_out_scores, mixture
from textmeta.heads.names import name_evidence, name_gate, name_scores
from textmeta.heads.neighbours import neighbourhood_loss
from textmeta.heads.pooling import centre, centred, pool, with_unlabelled_centre
from textmeta.heads.prototype import prototypes
from textmeta.heads.ridge import ridge
from textmeta.heads.scope import scope_inputs
from textmeta.heads.unlabelled import ROUNDS, soft_labelled_ridge, unlabelled_weight
from textmeta.meta.batch import Rows, TaskBatch, parts_in_turn
from textmeta.meta.initialisation import Initialisation, LearnerSettings
from textmeta.meta.inner_loop import inner_steps
from textmeta.model.initialisation import layer_of

__all__ = ["Adapted", "GroupStates", "LearnedTasks", "Reader", "TaskLearner"]

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
        scale: (T,) temperature t of these scores.
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


@dataclass(frozen=True)
class Adapted:
    """What the labelled texts of T tasks say by themselves, without names and unlabelled texts.

    Args:
        examples: which is in which class.
        queries: (T, V, d) pooling queries after the steps; the initial ones (V, d) where no task took any.
        factors: LoRA's of each task, where they were adapted.
        stepped: (T,) bool, whether a task took steps.
        mixture: (T, V).
        nll: (T,) of the mixture.
        view_nll: (T, V) of each view.
    """

    examples: Examples
    queries: Tensor
    factors: Mapping[str, Tensor] | None
    stepped: Tensor
    mixture: Tensor
    nll: Tensor
    view_nll: Tensor


class TaskLearner:
    """Learns tasks from their support sets, and classifies their queries.

    Args:
        reader: gives token states.
        initialisation: where tasks start.
        settings: how they are learned; ``steps`` at most those of the initialisation.
        rounds: of soft labels for unlabelled texts, which the ridge takes; 0 lets them move the centre alone.
    """

    def __init__(
        self, reader: Reader, initialisation: Initialisation, settings: LearnerSettings, rounds: int = ROUNDS
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

    def adapt(self, batch: TaskBatch, states: TokenStates, second_order: bool = False) -> Adapted:
        """Return what the labelled texts of T tasks say by themselves: evidence of the views, and the inner steps.

        Args:
            batch: the tasks.
            states: of their support sets.
            second_order: whether to differentiate through the gradients of the inner steps; else these are constants.
        """
        init = self.initialisation
        views = batch.support.pad(pool(states, init.queries))
        examples = Examples.of(batch.labels, batch.ways, views.dtype)
        folds = folds_of(examples)
        view_nll, nll, mixed = self._evidence(views, folds)
        queries, factors, stepped = self._take_steps(batch, states, examples, second_order)
        if self.settings.evidence == "after" and queries.ndim == 3:
            _, _, mixed = self._evidence(batch.support.pad(pool(states, queries, batch.support.row_task)), folds)
        return Adapted(examples, queries, factors, stepped, mixed, nll, view_nll)

    def learn(
        self, batch: TaskBatch, states: GroupStates, second_order: bool = False, adapted: Adapted | None = None
    ) -> LearnedTasks:
        """Learn T tasks.

        Args:
            batch: the tasks.
            states: of its texts.
            second_order: as for :meth:`adapt`.
            adapted: what :meth:`adapt` returned for the same labelled texts, where that is known.
        """
        init = self.initialisation
        adapted = adapted or self.adapt(batch, states.support, second_order)
        examples, queries = adapted.examples, adapted.queries
        if adapted.factors is not None:
            states = self.read(batch, Rows.of([()] * len(batch.ways), batch.ways.device), adapted.factors)
        own_queries = queries.ndim == 3

        def views_of(rows: Rows, own: TokenStates) -> tuple[Tensor, Tensor]:
            """Return views (T, n, V, d) by the initial queries, and by the adapted ones."""
            first = rows.pad(pool(own, init.queries))
            return first, rows.pad(pool(own, queries, rows.row_task)) if own_queries else first

        first, views = views_of(batch.support, states.support)
        extra_first, extra = views_of(batch.unlabelled, states.unlabelled)
        there = batch.unlabelled.there.to(views.dtype)
        strength, share = init.log_centre_strength.exp(), init.log_unlabelled_share.exp()

        def centre_of(labelled: Tensor, unlabelled: Tensor) -> Tensor:
            middle = centre(labelled, examples, init.centre, strength)
            if not batch.unlabelled.texts:
                return middle
            return with_unlabelled_centre(middle, examples.total + strength, unlabelled, there, share)

        middle, first_middle = centre_of(views, extra), centre_of(first, extra_first)
        names, name_scale, evidence = self._names(batch, states.names, examples, centred(first, first_middle))
        scale = temperature(init.temperature, log_shots(examples), batch.ways, adapted.stepped, adapted.nll)
        support, extra = centred(views, middle), centred(extra, middle)
        make = {"ridge": self._ridge, "prototype": prototypes}[self.settings.head]
        weights = make(support, adapted.mixture, examples)
        if batch.unlabelled.texts and self.rounds and self.settings.head == "ridge":
            by_name = name_scores(centred(extra_first, first_middle), names, init.name_view_weights.softmax(0))
            by_name = name_scale[:, None, None] * by_name
            weights = soft_labelled_ridge(
                weights,
                support,
                extra,
                there,
                adapted.mixture,
                examples,
                init.log_penalty.exp(),
                unlabelled_weight(init.unlabelled_weight, log_shots(examples), examples, there.sum(1)),
                lambda w: scale[:, None, None] * torch.einsum("trvd,tvdc->trc", extra, w) + by_name,
                self.rounds,
            )
        return LearnedTasks(
            queries,
            middle,
            weights,
            scale,
            names,
            first_middle,
            name_scale,
            prototypes(support, adapted.mixture, examples),
            adapted.mixture,
            examples.classes,
            examples.present,
            adapted.nll,
            adapted.view_nll,
            evidence,
            log_shots(examples),
            init.lora if adapted.factors is None else adapted.factors,
        )

    def learn_episodes(
        self, episodes: Sequence[Episode], second_order: bool = False, adapted: Adapted | None = None
    ) -> tuple[LearnedTasks, Rows, TokenStates]:
        """Learn the tasks of episodes; return them, their queries, and the token states of these.

        Args:
            episodes: T of them.
            second_order: as for :meth:`adapt`.
            adapted: as for :meth:`learn`.
        """
        device = self.initialisation.queries.device
        batch, queries = TaskBatch.of_episodes(episodes, device), Rows.of([e.query_texts for e in episodes], device)
        states = self.read(batch, queries)
        learned = self.learn(batch, states, second_order, adapted)
        if learned.factors is self.initialisation.lora:
            return learned, queries, states.queries
        return learned, queries, self.reader.read(queries.texts, learned.factors, queries.row_task)

    def logits(self, learned: LearnedTasks, rows: Rows, states: TokenStates) -> Tensor:
        """Return (T, n, C) logits of queries, -inf for classes that a task does not have.

        Args:
            learned: T tasks.
            rows: their queries.
            states: of these, read with the factors that were learned.
        """
        return _logits(learned, *self._query_scores(learned, rows, states))

    def scope_inputs(self, learned: LearnedTasks, rows: Rows, states: TokenStates) -> Tensor:
        """Return (T, n, 7) what the scope of queries is told by (:data:`~textmeta.heads.scope.SCOPE_INPUTS`)."""
        z, names = self._query_scores(learned, rows, states)
        to_means = torch.einsum("tnvd,tvdc->tnc", z, learned.class_means)
        has_names = learned.name_scale > 0
        return scope_inputs(
            _logits(learned, z, names),
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
        self, batch: TaskBatch, states: TokenStates, examples: Examples, support: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return centred names (T, C, V, d), 0 where there are none, their scale (T,) and their evidence (T,).

        ``support`` are the centred views (T, n, V, d) of the labelled texts, by the initial queries.
        """
        init = self.initialisation
        rows = batch.names.widened(examples.classes.shape[1])
        named = rows.there.any(1)
        names = rows.pad(pool(states, init.queries))
        # every name is a class of its own
        numbers = torch.arange(rows.there.shape[1], device=rows.there.device)
        own = Examples.of(torch.where(rows.there, numbers, -1), batch.ways, names.dtype)
        names = centred(names, centre(names, own, init.name_centre, init.log_name_centre_strength.exp()))
        names = names * rows.there[..., None, None]
        scale = init.log_name_scale.exp()
        scores = name_scores(support, names, init.name_view_weights.softmax(0))
        evidence = torch.where(named, name_evidence(scale * scores, examples), 0.0)
        several = examples.present.sum(1) >= 2
        few_shot = name_gate(init.name_gate, evidence, examples) * scale
        return names, torch.where(named, torch.where(several, few_shot, init.log_zero_shot_scale.exp()), 0.0), evidence

    def _take_steps(
        self, batch: TaskBatch, states: TokenStates, examples: Examples, second_order: bool
    ) -> tuple[Tensor, dict[str, Tensor] | None, Tensor]:
        """Return pooling queries, LoRA's factors if they were adapted, and (T,) whether a task took steps."""
        init, settings = self.initialisation, self.settings
        can_learn = (examples.member.sum(1) >= 2).sum(1) >= 2
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
        parts = parts_in_turn(batch, examples, steps)
        told = [Examples.of(labels, batch.ways, scale.dtype) for _, labels, _ in parts]

        def loss(step: int, tensors: Mapping[str, Tensor]) -> Tensor:
            rows, _, chosen = parts[step]
            if with_lora:
                factors = {name: tensors.get(FACTOR + name, value) for name, value in init.lora.items()}
                own = self.reader.read(rows.texts, factors, rows.row_task)
            else:
                own = states if chosen is None else states.where(chosen)
            queries = tensors.get(QUERIES)
            pooled = pool(own, init.queries) if queries is None else pool(own, queries, rows.row_task)
            return neighbourhood_loss(rows.pad(pooled), told[step], weights, scale)

        chance = [part.number.clamp(min=2).log() for part in told]
        gate = torch.sigmoid(init.step_gate[0] + init.step_gate[1] * log_shots(examples))  # (T,)
        pull = torch.sigmoid(init.pull)

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
                moved[name] = value - far[:, None, None] * size * direction - pull * (value - start[name])
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


def _logits(learned: LearnedTasks, z: Tensor, names: Tensor) -> Tensor:
    """Return logits (T, n, C) from centred views (T, n, V, d) and cosines (T, n, C) to the names."""
    scores = torch.einsum("tnvd,tvdc->tnc", z, learned.weights)
    logits = learned.scale[:, None, None] * scores + learned.name_scale[:, None, None] * names
    return logits.masked_fill(~learned.classes[:, None], -torch.inf)
