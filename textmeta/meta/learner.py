"""Learning a task: from its support set to all that its queries are classified by."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from textmeta.data.episodes import Episode
from textmeta.encoder.lora import LORA_B, layer_of
from textmeta.encoder.token_states import TokenStateReader, TokenStates
from textmeta.heads import HEADS
from textmeta.heads.common import Examples, log_shots, mean_over_classes, temperature
from textmeta.heads.evidence import fold_nll, folds_of, left_out_scores, mixture
from textmeta.heads.names import name_evidence, name_gate, name_scores
from textmeta.heads.neighbours import neighbourhood_loss, with_company
from textmeta.heads.pooling import centre, centred, pool, to_length_one, with_unlabelled_centre
from textmeta.heads.prototype import prototypes
from textmeta.heads.scope import scope_probability
from textmeta.heads.unlabelled import soft_labelled_ridge, unlabelled_weight
from textmeta.meta.adapter import Adapter
from textmeta.meta.batch import Rows, TaskBatch, parts_in_turn
from textmeta.meta.initialisation import LORA
from textmeta.meta.inner_loop import LossOfStep, Tensors, inner_steps

GRADIENT_EPSILON = 1e-4
KEPT_TEXTS = 512  # texts, times inner steps, whose activations are kept for the second order of LoRA steps
QUERIES, OFFSET = "queries", "offset"


@dataclass(frozen=True)
class LearnedTask:
    """All that queries are classified by, of T tasks that were learned together; after ``fit`` of one.

    No support text, nor its states, is in it.
    """

    queries: Tensor  # (T, V, d) pooling queries after the steps; the initial ones at (V, d) where no task took any
    centre: Tensor  # (T, V, d) of texts pooled so
    weights: Tensor  # (T, V, d, C): a text's scores are Σ_v z_v · W_v
    scale: Tensor  # (T,) temperature t of these scores
    names: Tensor  # (T, C, V, d) centred views of the names, 0 where a task has none
    name_centre: Tensor  # (T, V, d) of texts that names are compared with, pooled by the initial queries
    name_scale: Tensor  # (T,) factor on the cosines to names; 0 where a task has none
    class_means: Tensor  # (T, V, d, C) prototypes, for the scope
    class_vectors: Tensor  # (T, C, d) of length 1, for comparing tasks; see textmeta.nearest.TaskEmbedding
    mixture: Tensor  # (T, V) weights of the views
    classes: Tensor  # (T, C) bool, those that a task has
    present: Tensor  # (T, C) bool, those that have examples
    nll: Tensor  # (T,) of the mixture, of left-out examples before the steps
    view_nll: Tensor  # (T, V) of each view, likewise
    name_evidence: Tensor  # (T,) E
    shots: Tensor  # (T,) log(1 + k)
    factors: Tensors  # (T, out, in) LoRA's of each task, if adapted; else empty: all share the adapter's

    def to(self, device: torch.device) -> "LearnedTask":
        """Return the same on a device."""
        if self.queries.device == device:
            return self
        own = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, factors={name: value.to(device) for name, value in self.factors.items()}, **own)


@dataclass(frozen=True)
class Answers:
    """What is made of the queries of T tasks."""

    task: LearnedTask  # these
    logits: Tensor  # (T, n, C), -inf for classes that a task does not have
    to_names: Tensor  # (T, n, C) cosines to the names of classes, 0 where there are none
    views: Tensor  # (T, n, V, d) centred
    rule: Tensor | None = None  # for what is out of scope, if the adapter has one

    @property
    def scope_inputs(self) -> Tensor:
        """Return (T, n, 7) what each query's scope is told by.

        These are its largest probability and the cosines to the nearest class mean and name, 0 where there is none; of
        its task, whether there are names, the mixture's NLL, log(1 + k) and log C.
        """
        task, nll, has_names = self.task, self.task.nll, self.task.name_scale > 0
        to_means = self.views.flatten(2) @ task.class_means.flatten(1, 2)
        to_means = to_means.masked_fill(~task.present[:, None], -torch.inf)
        to_names = self.to_names.masked_fill(~(task.classes & has_names[:, None])[:, None], -torch.inf)
        nearest = [torch.nan_to_num(part.amax(-1), neginf=0.0) for part in (to_means, to_names)]
        of_query = torch.stack([self.logits.softmax(-1).amax(-1), *nearest], -1)  # (T, n, 3)
        of_task = torch.stack([has_names.to(nll), nll, task.shots, task.classes.sum(1).to(nll).log()], -1)  # (T, 4)
        return torch.cat([of_query, of_task[:, None].expand(-1, of_query.shape[1], -1)], -1)

    @property
    def scope(self) -> Tensor | None:
        """Return (T, n) the probability that a query belongs to any of the classes; None without a rule."""
        return None if self.rule is None else scope_probability(self.rule, self.scope_inputs)


class TaskLearner:
    """Learns tasks from their support sets, and classifies their queries: by token states of texts, and an adapter."""

    def __init__(self, reader: TokenStateReader, adapter: Adapter) -> None:
        self.reader = reader
        self.adapter = adapter

    def learn(self, batch: TaskBatch, second_order: bool = False) -> LearnedTask:
        """Learn T tasks together; each comes out as it would alone.

        ``second_order``: whether to differentiate through the gradients of the inner steps; else these are constants.
        """
        init, settings = self.adapter.initialisation, self.adapter.learner
        support, names, unlabelled = self._read(batch, {})
        first = batch.support.pad(pool(support, init.queries))  # views (T, n, V, d) by the initial queries
        examples = Examples.of(batch.labels, batch.ways, first.dtype)
        if batch.weights is not None:
            examples = examples.weighted(batch.weights.to(first.dtype))
        if batch.class_weights is not None:
            examples = replace(examples, class_weights=batch.class_weights.to(first.dtype))
        view_nll, nll, mixed = self._evidence(first, examples)
        queries, factors, stepped = self._adapt_features(batch, support, examples, second_order)
        if factors:
            support, names, unlabelled = self._read(batch, factors)
            first = batch.support.pad(pool(support, init.queries))
        extra_first = batch.unlabelled.pad(pool(unlabelled, init.queries))
        views, extra = first, extra_first
        if queries.ndim == 3:
            views = batch.support.pad(pool(support, queries, batch.support.row_task))
            extra = batch.unlabelled.pad(pool(unlabelled, queries, batch.unlabelled.row_task))

        middle = self._centre(batch, examples, views, extra)
        first_middle = self._centre(batch, examples, first, extra_first)
        support_z, extra_z = centred(views, middle), centred(extra, middle)
        first_z, extra_first_z = centred(first, first_middle), centred(extra_first, first_middle)
        more = examples.classes.shape[1] - batch.names.there.shape[1]
        name_rows = replace(batch.names, there=pad(batch.names.there, (0, more)))
        name_views = name_rows.pad(pool(names, init.queries))
        name_z, name_scale, evidence = self._names(batch.ways, name_rows.there, name_views, examples, first_z)
        shots = log_shots(examples)
        scale = temperature(init.temperature, shots, batch.ways, stepped, nll)
        weights = HEADS[settings.head](support_z, mixed, examples, init.log_penalty.exp())
        if batch.unlabelled.texts and settings.head == "ridge":
            by_name = name_scores(extra_first_z, name_z, init.name_view_weights.softmax(0))
            by_name = name_scale[:, None, None] * by_name
            there = batch.unlabelled.there.to(views.dtype)
            penalty = init.log_penalty.exp()
            share = unlabelled_weight(init.unlabelled_weight, shots, examples, there.sum(1))
            weights = soft_labelled_ridge(
                weights, support_z, extra_z, there, examples, mixed, penalty, share, scale, by_name
            )
        if settings.adapt == "offset":
            weights = self._adapt_offset(support_z, weights, scale, examples, second_order)
        # of the upper view the mean of each class, or its name where it has no example
        sums = torch.einsum("tn,tnc,tnd->tcd", examples.weights, examples.member, first[:, :, -1])
        return LearnedTask(
            queries=queries,
            centre=middle,
            weights=weights,
            scale=scale,
            names=name_z,
            name_centre=first_middle,
            name_scale=name_scale,
            class_means=prototypes(support_z, mixed, examples),
            class_vectors=to_length_one(torch.where(examples.present[..., None], sums, name_views[:, :, -1])).detach(),
            mixture=mixed,
            classes=examples.classes,
            present=examples.present,
            nll=nll,
            view_nll=view_nll,
            name_evidence=evidence,
            shots=shots,
            factors=factors,
        )

    def answer(self, task: LearnedTask, queries: Rows) -> Answers:
        """Classify the queries of T learned tasks; what a query gets does not depend on the others."""
        init = self.adapter.initialisation
        of_task = (task.factors, queries.row_task) if task.factors else (init.lora,)
        states = self.reader.read(queries.texts, *of_task)
        own = queries.pad(pool(states, task.queries, queries.row_task if task.queries.ndim == 3 else None))
        first = own if task.queries.ndim == 2 else queries.pad(pool(states, init.queries))
        return self._answers(task, own, first)

    def answer_episodes(self, episodes: Sequence[Episode], second_order: bool = False) -> Answers:
        """Learn the tasks of T episodes, and classify their queries."""
        device = self.adapter.initialisation.queries.device
        task = self.learn(TaskBatch.of_episodes(episodes, device), second_order)
        return self.answer(task, Rows.of([e.query_texts for e in episodes], device))

    def answer_all(self, task: LearnedTask, texts: Sequence[str]) -> Answers:
        """Classify n texts, which are read once, by each of T tasks; by one alone where it has factors of its own."""
        init, tasks = self.adapter.initialisation, len(task.centre)
        row_task = torch.zeros(len(texts), dtype=torch.long, device=task.centre.device)
        states = self.reader.read(texts, *((task.factors, row_task) if task.factors else (init.lora,)))
        first = pool(states, init.queries).expand(tasks, -1, -1, -1)
        if task.queries.ndim == 2:
            return self._answers(task, first, first)
        own = pool(states, task.queries) if tasks > 1 else pool(states, task.queries[0])[None]
        return self._answers(task, own, first)

    def _answers(self, task: LearnedTask, own: Tensor, first: Tensor) -> Answers:
        """Classify texts by their views (T, n, V, d): by the queries of the tasks, and by the initial ones."""
        z = centred(own, task.centre)
        to_names = z.new_zeros(*z.shape[:2], task.classes.shape[1])
        if task.name_scale.any():
            at_start = centred(first, task.name_centre)
            to_names = name_scores(at_start, task.names, self.adapter.initialisation.name_view_weights.softmax(0))
        scores = z.flatten(2) @ task.weights.flatten(1, 2)  # on a CPU einsum takes 20 times as long
        logits = task.scale[:, None, None] * scores + task.name_scale[:, None, None] * to_names
        rule = self.adapter.scope
        return Answers(task, logits.masked_fill(~task.classes[:, None], -torch.inf), to_names, z, rule)

    def _read(self, batch: TaskBatch, factors: Tensors) -> tuple[TokenStates, TokenStates, TokenStates]:
        """Read support texts, names and unlabelled texts together; ``factors`` are LoRA's of each task, if adapted."""
        groups = (batch.support, batch.names, batch.unlabelled)
        texts = [text for group in groups for text in group.texts]
        if factors:
            states = self.reader.read(texts, factors, torch.cat([group.row_task for group in groups]))
        else:
            states = self.reader.read(texts, self.adapter.initialisation.lora)
        rows = torch.split(torch.arange(len(texts), device=batch.ways.device), [len(group.texts) for group in groups])
        support, names, unlabelled = (states.where(part) for part in rows)
        return support, names, unlabelled

    def _centre(self, batch: TaskBatch, examples: Examples, labelled: Tensor, unlabelled: Tensor) -> Tensor:
        """Return the centre (T, V, d) of views (T, n, V, d) of labelled texts, which those of unlabelled ones join."""
        init = self.adapter.initialisation
        strength = init.log_centre_strength.exp()
        middle = centre(labelled, examples, init.centre, strength)
        if not batch.unlabelled.texts:
            return middle
        there = batch.unlabelled.there.to(labelled.dtype)
        share = init.log_unlabelled_share.exp()
        return with_unlabelled_centre(middle, examples.total + strength, unlabelled, there, share)

    def _evidence(self, views: Tensor, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """Return NLL of each view (T, V), NLL of their mixture (T,), and the mixture (T, V)."""
        init = self.adapter.initialisation
        folds = folds_of(examples)

        def nll_of(mixed: Tensor | None) -> Tensor:
            numbers = (init.centre, init.log_centre_strength.exp(), init.log_penalty.exp())
            scores = left_out_scores(views, folds, *numbers, mixed)
            return fold_nll(scores, folds, init.log_evidence_scale.exp())

        view_nll = nll_of(None)
        strength, half = init.log_evidence_strength.exp(), init.log_evidence_half.exp()
        mixed = mixture(init.view_prior, strength, half, view_nll, folds)
        return view_nll, nll_of(mixed)[:, 0], mixed

    def _names(
        self, ways: Tensor, there: Tensor, names: Tensor, examples: Examples, support: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return centred names (T, C, V, d), 0 where there are none, their scale (T,) and their evidence (T,).

        ``there`` (T, C) says which classes have a name, ``names`` are their views (T, C, V, d), ``support`` the centred
        views (T, n, V, d) of the labelled texts, both by the initial queries.
        """
        init = self.adapter.initialisation
        named = there.any(1)
        # every name is a class of its own
        numbers = torch.arange(there.shape[1], device=there.device)
        own = Examples.of(torch.where(there, numbers, -1), ways, names.dtype)
        z = centred(names, centre(names, own, init.name_centre, init.log_name_centre_strength.exp()))
        z = z * there[..., None, None]
        scale = init.log_name_scale.exp()
        scores = name_scores(support, z, init.name_view_weights.softmax(0))
        evidence = torch.where(named, name_evidence(scale * scores, examples), 0.0)
        several = examples.present.sum(1) >= 2
        few_shot = name_gate(init.name_gate, evidence, examples) * scale
        return z, torch.where(named, torch.where(several, few_shot, init.log_zero_shot_scale.exp()), 0.0), evidence

    def _adapt_features(
        self, batch: TaskBatch, states: TokenStates, examples: Examples, second_order: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Take the inner steps on pooling queries and LoRA, whichever are adapted.

        Returns (T, V, d) pooling queries, or (V, d) if none changed; LoRA's factors; and (T,) which tasks took steps.
        """
        init, settings = self.adapter.initialisation, self.adapter.learner
        can_learn = (examples.member.sum(1) >= 2).sum(1) >= 2
        tasks = len(batch.ways)
        with_lora = "lora" in settings.adapt
        start: dict[str, Tensor] = {}
        if "pooling" in settings.adapt:
            start[QUERIES] = init.queries.expand(tasks, -1, -1)
        if with_lora:
            # A has no gradient where B is 0, so B alone is adapted
            adapted = {name: value for name, value in init.lora.items() if LORA_B in name}
            start |= {LORA + name: value.expand(tasks, -1, -1) for name, value in adapted.items()}
        if not start or not settings.steps or not can_learn.any():
            offset = settings.adapt == "offset" and settings.steps > 0  # whose loss two examples in all can lower
            return init.queries, {}, (examples.present.sum(1) >= 2) & offset
        shared = {LORA + name: value for name, value in init.lora.items()} if with_lora else {}
        shared |= {QUERIES: init.queries, "scale": init.loss_log_scale, "weights": init.loss_view_weights}
        parts = parts_in_turn(batch, examples, settings.steps)
        told = [with_company(part) for _, part, _ in parts]
        # once for all steps, on a GPU without waiting for it; of a large task a step has its own, lest memory grow
        whole = with_lora and parts[0][2] is None
        entered = list(self.reader.entering(batch.support.texts)) if whole else None

        def loss(step: int, tensors: Tensors) -> Tensor:
            rows, voting, chosen = parts[step]
            if with_lora:
                factors = {name: tensors[LORA + name] for name in init.lora}
                own = self.reader.read(rows.texts, factors, rows.row_task, entered)
            else:
                own = states if chosen is None else states.where(chosen)
            queries = tensors[QUERIES]
            pooled = pool(own, queries, rows.row_task if queries.ndim == 3 else None)
            weights, scale = tensors["weights"].softmax(0), tensors["scale"].exp()
            return neighbourhood_loss(rows.pad(pooled), voting, told[step], weights, scale)

        kept_texts = len(batch.support.texts) * settings.steps
        last = self._steps(loss, start, shared, examples, second_order, with_lora and kept_texts > KEPT_TEXTS)
        kept = can_learn[:, None, None]
        queries = torch.where(kept, last[QUERIES], start[QUERIES]) if QUERIES in last else init.queries
        if not with_lora:
            return queries, {}, can_learn
        factors = {
            name: torch.where(kept, last[LORA + name], value) if LORA + name in last else value.expand(tasks, -1, -1)
            for name, value in init.lora.items()
        }
        return queries, factors, can_learn

    def _adapt_offset(
        self, support: Tensor, weights: Tensor, scale: Tensor, examples: Examples, second_order: bool
    ) -> Tensor:
        """Return the head's weights (T, V, d, C) with an offset that lowers the support set's own cross entropy (ANIL).

        Source: Raghu et al. (2020), "Rapid Learning or Feature Reuse?", section 4.
        """
        own = examples.member.argmax(-1)[..., None]

        def loss(step: int, tensors: Tensors) -> Tensor:
            own_weights = tensors["weights"] + tensors[OFFSET].view_as(weights)
            scores = torch.einsum("tnvd,tvdc->tnc", tensors["support"], own_weights)
            logits = (tensors["scale"][:, None, None] * scores).masked_fill(~examples.present[:, None], -torch.inf)
            counts = examples.weights > 0
            logs = log_softmax(torch.where(counts[..., None], logits, 0.0), -1)
            return mean_over_classes(-torch.where(counts, logs.gather(-1, own)[..., 0], 0.0), examples)

        start = {OFFSET: weights.new_zeros(weights.shape[0], weights.shape[1] * weights.shape[2], weights.shape[3])}
        shared = {"support": support, "weights": weights, "scale": scale}
        last = self._steps(loss, start, shared, examples, second_order, checkpointed=False)
        return weights + last[OFFSET].view_as(weights)

    def _steps(
        self,
        loss: LossOfStep,
        start: Tensors,
        shared: Tensors,
        examples: Examples,
        second_order: bool,
        checkpointed: bool,
    ) -> dict[str, Tensor]:
        """Take the inner steps on a loss; return what they made of the tensors of ``start``, (T, …) each.

        x ← x - γ(k) α_j min(1, L) g / √(mean(g²) + ε²) - δ (x - x₀); steps shrink as the loss L does.
        """
        init, steps = self.adapter.initialisation, self.adapter.learner.steps
        gate = torch.sigmoid(init.step_gate[0] + init.step_gate[1] * log_shots(examples))  # (T,)
        pull = torch.sigmoid(init.pull)
        adapted = {layer_of(factor) for factor in init.lora if LORA + factor in start}
        layers = sorted(adapted, key=lambda layer: int(layer.rsplit(".", 1)[1]))
        log_sizes = {QUERIES: init.log_step_sizes, OFFSET: init.offset_log_step_sizes}  # (J, V) or (J, V, d); (J,)
        for name in start.keys() - log_sizes.keys():
            log_sizes[name] = init.lora_log_step_sizes[:, layers.index(layer_of(name.removeprefix(LORA)))]  # (J,)

        def update(step: int, fast: Tensors, gradients: Tensors, losses: Tensor) -> dict[str, Tensor]:
            far = gate * losses.clamp(max=1.0)  # (T,)
            moved = {}
            for name, value in fast.items():
                # one root mean square a task and view, or a task and tensor
                square = gradients[name].square().mean(-1 if name == QUERIES else (-2, -1), keepdim=True)
                if name == OFFSET:  # padding is no entry of a task
                    square = square * (value.shape[-1] / examples.classes.sum(1).to(square))[:, None, None]
                direction = gradients[name] * (square + GRADIENT_EPSILON**2).rsqrt()
                size = log_sizes[name][step].exp()
                size = size[..., None] if name == QUERIES and size.ndim == 1 else size
                moved[name] = value - far[:, None, None] * size * direction - pull * (value - start[name])
            return moved

        return inner_steps(loss, start, shared, update, steps, second_order=second_order, checkpointed=checkpointed)
