"""How fast meta-gradients of pooling steps are beside the loop that people write: task by task, in plain torch.

    python benchmarks/engine.py --data FILE.jsonl

The loop runs the encoder over one task's texts, in the same batches by length as textmeta, and learns that task.
textmeta takes all together: "fresh" runs the frozen layers too, "cached" did so before, as in training. Sides
alternate; ratios are of medians. The distance of the gradients is printed; accuracies must be the same.
"""

import argparse
import itertools
import math
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from measure import alternate, print_table
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.nn.utils.rnn import pad_sequence

from textmeta.data.corpus import CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.token_states import TokenStateReader
from textmeta.meta.adapter import Adapter
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.batch import TaskBatch
from textmeta.meta.initialisation import LORA, Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner

Tensors = dict[str, Tensor]


def pool(h: Tensor, scale: Tensor, mask: Tensor, queries: Tensor) -> Tensor:
    """Return views (n, V, d) of states (n, V, L, d), whose scores are scaled by (n, V, L)."""
    scores = (torch.einsum("nvld,vd->nvl", h, queries) * scale).masked_fill(~mask[:, None], -torch.inf)
    return normalize(torch.einsum("nvl,nvld->nvd", scores.softmax(-1), h), dim=-1)


def centred(u: Tensor, support: Tensor, p: Tensors) -> Tensor:
    """Return views less the centre of the support's, of length 1."""
    strength = p["log_centre_strength"].exp()
    return normalize(u - (support.sum(0) + strength * p["centre"]) / (len(support) + strength), dim=-1)


def left_out_nll(u: Tensor, labels: Tensor, targets: Tensor, mixtures: Tensor, p: Tensors) -> Tensor:
    """Return (M,) NLL of texts by ridge regressions on mixtures (M, V) of the views, fold by fold: a text a class."""
    fold = (one_hot(labels).cumsum(0) - 1)[torch.arange(len(labels)), labels]
    total = torch.zeros(())
    for number in fold.unique():
        out, kept = (fold == number).nonzero()[:, 0], (fold != number).nonzero()[:, 0]
        z = centred(u, u[kept], p)
        kernels = torch.einsum("mv,nvd,kvd->mnk", mixtures, z, z)
        system = kernels[:, kept][:, :, kept] + p["log_penalty"].exp() * torch.eye(len(kept), dtype=u.dtype)
        scores = kernels[:, out][:, :, kept] @ torch.linalg.solve(system, targets[kept])
        logits = (p["log_evidence_scale"].exp() * scores).transpose(1, 2)  # (M, C, texts)
        total = total + cross_entropy(logits, labels[out].expand(len(logits), -1), reduction="none").sum(1)
    return total / len(labels)


def neighbourhood_loss(u: Tensor, labels: Tensor, p: Tensors) -> Tensor:
    """Return how badly each text is told by the cosines to the others."""
    cosines = torch.einsum("nvd,v,mvd->nm", u, p["loss_view_weights"].softmax(0), u)
    near = (p["loss_log_scale"].exp() * cosines).masked_fill(torch.eye(len(u), dtype=torch.bool), -torch.inf)
    votes = torch.stack([near[:, labels == c].logsumexp(1) for c in labels.unique()], 1)
    return cross_entropy(votes - (one_hot(labels).sum(0) - one_hot(labels)).log(), labels)


def query_loss(reader: TokenStateReader, p: Tensors, e: Episode, steps: int, second: bool) -> tuple[Tensor, Tensor]:
    """Learn a task whose classes have equally many examples, two or more; return its queries' loss and accuracy."""
    batch = TaskBatch.of_episodes([e])  # folds follow its order of the texts
    labels, n, ways, shots = batch.labels[0], len(e.support_texts), e.ways, math.log1p(len(e.support_texts) / e.ways)
    factors = {name.removeprefix(LORA): value for name, value in p.items() if name.startswith(LORA)}
    states = [h.transpose(0, 1) for h in reader.read((*batch.support.texts, *e.query_texts), factors).unpadded()]
    h = pad_sequence(states, batch_first=True).transpose(1, 2)
    mask = torch.arange(h.shape[2]) < torch.tensor([len(state) for state in states])[:, None]
    targets = one_hot(labels).double() - 1 / ways
    scale = (h.square().mean(-1) + 1e-6).rsqrt() / math.sqrt(h.shape[-1])
    support = (h[:n], scale[:n], mask[:n])
    first = pool(*support, p["queries"]).double()
    each = left_out_nll(first, labels, targets, torch.eye(h.shape[1], dtype=torch.float64), p)
    seen = n / (n + p["log_evidence_half"].exp())
    mixture = (p["view_prior"] - p["log_evidence_strength"].exp() * seen * each).softmax(0)
    nll = left_out_nll(first, labels, targets, mixture[None], p)[0]
    queries, gate = p["queries"], (p["step_gate"][0] + p["step_gate"][1] * shots).sigmoid()
    support = support if second else tuple(part.detach() for part in support)
    for step in range(steps):
        own = queries if second else queries.detach().requires_grad_()
        loss = neighbourhood_loss(pool(*support, own), labels, p)
        (g,) = torch.autograd.grad(loss, own, create_graph=second)
        far = gate * (loss if second else loss.detach()).clamp(max=1.0)
        move = far * p["log_step_sizes"][step].exp()[:, None] * g * (g.square().mean(-1, keepdim=True) + 1e-8).rsqrt()
        queries = queries - move - p["pull"].sigmoid() * (queries - p["queries"])
    u = pool(h, scale, mask, queries)
    x = (centred(u, u[:n], p) * mixture.sqrt()[:, None]).flatten(1)
    system = x[:n] @ x[:n].T + p["log_penalty"].exp() * torch.eye(n, dtype=torch.float64)
    told = torch.stack([nll.new_tensor(value) for value in (1, shots, math.log(ways / 5), 1)] + [nll])
    logits = (p["temperature"].double() @ told).exp() * (x[n:] @ x[:n].T @ torch.linalg.solve(system, targets))
    right = torch.as_tensor(e.query_labels)
    return cross_entropy(logits, right), (logits.argmax(1) == right).double().mean()


def loop(reader: TokenStateReader, leaves: Tensors, episodes: list[Episode], steps: int, second: bool) -> tuple:
    """Return the gradient summed over the tasks, one after another, and their accuracies."""
    total, accuracies = {name: torch.zeros_like(value) for name, value in leaves.items()}, []
    for episode in episodes:
        loss, accuracy = query_loss(reader, leaves, episode, steps, second)
        for name, part in zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True):
            total[name] += 0 if part is None else part
        accuracies.append(accuracy)
    return total, torch.stack(accuracies)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a local corpus with columns text and label")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default=EncoderSettings().model)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sampler = EpisodeSampler(load_corpus(CorpusSettings(arguments.data)), EpisodeSettings(5, 5, 5), seed=0)
    encoder = Encoder(EncoderSettings(arguments.model, max_length=64))
    readers = {"fresh": (fresh := TokenStateReader(encoder)), "cached": (cached := TokenStateReader(encoder))}
    settings = LearnerSettings(layers=fresh.layers)
    start = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, settings, seed=0)
    generator = torch.Generator().manual_seed(0)  # away from the start, where LoRA's B is 0 and A has no gradient
    noise = {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in start.tensors().items()}
    leaves = {name: (value + noise[name]).requires_grad_() for name, value in start.tensors().items()}
    adapter = replace(Adapter.of(fresh, settings, start), initialisation=start.with_tensors(leaves))
    rows = [("algorithm", "tasks", "loop to fresh", "loop to cached", "distance of the gradients")]
    for algorithm, tasks in itertools.product(("fomaml", "maml"), arguments.tasks):
        episodes, run = sampler.take(tasks), ALGORITHMS[algorithm].gradient
        cached.cache([text for e in episodes for text in (*e.support_texts, *e.query_texts)])
        sides = {name: partial(run, TaskLearner(reader, adapter), episodes, leaves) for name, reader in readers.items()}
        sides["loop"] = partial(loop, fresh, leaves, episodes, settings.steps, algorithm == "maml")
        mine, (theirs, accuracies) = sides["fresh"](), sides["loop"]()
        assert torch.allclose(mine.accuracy.double(), accuracies), f"{mine.accuracy}, but the loop's {accuracies}"
        one, two = (torch.cat([part[name].flatten() for name in leaves]) for part in (mine.gradient, theirs))
        times = alternate(sides, arguments.repeats, f"{algorithm}, {tasks} tasks")
        ratios = [f"{median(times['loop']) / median(times[name]):.2f}" for name in readers]
        rows.append((algorithm, str(tasks), *ratios, f"{float((one - two).norm() / two.norm()):.0e}"))
    print_table(rows)


if __name__ == "__main__":
    main()
