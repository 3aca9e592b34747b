"""Out of scope detection: which queries belong to none of an episode's classes, by textmeta's rule and by baselines."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accuracy_bench import Bench
from accuracy_episodes import OUTSIDE, Cell
from accuracy_methods import Method, Outcome, Variant, per_episode, trained_variants
from accuracy_scores import ScopeScores
from accuracy_setfit import LOGISTIC
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from textmeta.data.episodes import Episode
from textmeta.errors import AdapterError
from textmeta.meta.adaptation import task_weights, unadapted
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.shared_features import SharedFeatures
from textmeta.meta.strengths import best_start
from textmeta.meta.task_learner import learn_task, scope_rule, text_logits
from textmeta.meta.tasks import support_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import class_mask
from textmeta.model.initialisation import SCOPE
from textmeta.model.scope import scope_probability, text_inputs

__all__ = ["SCOPE_METHODS", "in_scope_probabilities", "score_scope"]

TRUE_POSITIVES = 0.95


def frozen(bench: Bench, cell: Cell, episodes: list[Episode], _: Variant) -> Outcome:
    """The largest cosine to a frozen prototype."""
    row_of, tensor = bench.features(cell, episodes)
    features, start, found = tensor.numpy(), time.monotonic(), []
    for episode in episodes:
        support = features[[row_of[text] for text in episode.support_texts]]
        prototypes = np.eye(episode.ways, dtype=support.dtype)[episode.support_labels].T @ support
        prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
        found.append((features[[row_of[text] for text in episode.query_texts]] @ prototypes.T).max(1))
    return Outcome(score_scope(found, episodes), per_episode(start, episodes))


def logistic(bench: Bench, cell: Cell, episodes: list[Episode], _: Variant) -> Outcome:
    """The largest probability of logistic regression on frozen features."""
    row_of, tensor = bench.features(cell, episodes)
    features, start, found = tensor.numpy(), time.monotonic(), []
    for episode in episodes:
        head = LogisticRegression(**LOGISTIC)
        head.fit(features[[row_of[text] for text in episode.support_texts]], episode.support_labels)
        found.append(head.predict_proba(features[[row_of[text] for text in episode.query_texts]]).max(1))
    return Outcome(score_scope(found, episodes), per_episode(start, episodes))


def rule(bench: Bench, cell: Cell, episodes: list[Episode], variant: Variant) -> Outcome:
    """The rule that was fitted on a fold's validation classes, of what was meta-trained on its training classes."""
    trained = bench.trained("textmeta", cell, variant["seed"])
    start = time.monotonic()
    shared = bench.of_fold(cell.corpus, cell.fold, variant["seed"])  # also warms the encoder, for tasks that take steps
    encoder, result = bench.encoder(bench.recipe.lora), trained.result
    found = in_scope_probabilities(encoder, result.parameters, result.inner, shared, episodes)
    return Outcome(score_scope(found, episodes, probabilities=True), per_episode(start, episodes) | trained.told)


@torch.no_grad()
def in_scope_probabilities(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    inner: InnerLoopSettings,
    shared: SharedFeatures,
    episodes: Sequence[Episode],
) -> list[np.ndarray]:
    """Return the probability of each query to be in scope, as ``FewShotClassifier.scope_score`` does after ``fit``.

    Args:
        encoder: made the features.
        parameters: of an adapter with a rule.
        inner: where it takes no steps, tasks share their features.
        shared: features of all texts.
        episodes: E episodes.

    Raises:
        AdapterError: if there is no rule.
    """
    if SCOPE not in parameters:
        raise AdapterError("no rule for what is out of scope was fitted: are there 3 validation classes?")
    found = []
    for episode in episodes:
        if inner.steps:  # each task has features of its own
            learned = learn_task(encoder, parameters, inner, support_batch(encoder, [episode]))
            logits = text_logits(encoder, parameters, inner, learned, episode.query_texts)
            found.append(learned.scope_probability(logits).double().cpu().numpy())
            continue
        support, features, queries = shared.task(episode)
        start = unadapted(parameters, support, inner, encoder.hidden_size)
        best, start = best_start(start, list(features[:, None]), support, parameters)
        weights = task_weights(encoder, start, support)
        logits = start.head.logits(queries[best], weights, start.scalars, class_mask(support.ways))[0]
        of_task = scope_rule(start, features[int(best)][None], support, parameters[SCOPE])
        of_texts = text_inputs(logits, start.scalars["temperature"].view(-1)[0])
        found.append(scope_probability(of_task, of_texts).double().cpu().numpy())
    return found


def score_scope(
    scores: Sequence[np.ndarray], episodes: Sequence[Episode], *, probabilities: bool = False
) -> ScopeScores:
    """Score how far queries seem to be in scope, (queries,) of each episode.

    Args:
        scores: the larger, the more in scope.
        episodes: whose queries from outside are labelled so.
        probabilities: whether 0.5 is where a text is rejected.
    """
    rows = []
    for own, episode in zip(scores, episodes, strict=True):
        inside = episode.query_labels != OUTSIDE
        # every threshold, also between two that are on one line, for the rate is read off at one
        wrong, right, _ = roc_curve(inside, own, drop_intermediate=False)
        fpr95 = wrong[np.argmax(right >= TRUE_POSITIVES)]
        accuracy = ((own >= 0.5) == inside).mean()
        rows.append((roc_auc_score(inside, own), average_precision_score(inside, own), fpr95, accuracy))
    auroc, aupr, fpr95, accuracy = np.array(rows).T
    return ScopeScores(auroc, aupr, fpr95, accuracy if probabilities else None)


def _rules(bench: Bench, cell: Cell) -> list[Variant]:
    """Return the seeds; none, where the recipe fits no rule."""
    return trained_variants("textmeta")(bench, cell) if bench.recipe.calibration is not None else []


SCOPE_METHODS = {"frozen": Method(frozen), "logistic": Method(logistic), "textmeta": Method(rule, _rules)}
