"""How fast meta-gradients are beside the loop that people write: task by task, in plain torch.

    python benchmarks/engine.py --data FILE.jsonl                        # by default the corpus that comes along
    python benchmarks/engine.py --adapt lora --device cuda --precision bf16

With pooling steps the loop runs the encoder over a task's texts, in the same batches by length as textmeta, and learns
that task. With steps on LoRA's B it runs the whole PEFT model in each step, on the task's support set, padded to its
longest text. textmeta takes all together: "fresh" runs the frozen layers too, "cached" did so before, as in training.
Sides alternate; ratios are of medians. The distance of the gradients is printed; accuracies must be the same.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from measure import alternate, markdown
from peft import get_peft_model
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.nn.utils.rnn import pad_sequence

from textmeta.data.bundled import load_bundled
from textmeta.data.corpus import CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.encoder.encoder import Encoder, EncoderSettings
from textmeta.encoder.lora import LORA_B, layer_of
from textmeta.encoder.pretrained import load_pretrained
from textmeta.encoder.token_states import TokenStateReader
from textmeta.meta.adapter import Adapter
from textmeta.meta.algorithms import ALGORITHMS
from textmeta.meta.batch import TaskBatch
from textmeta.meta.initialisation import LORA, Initialisation, LearnerSettings
from textmeta.meta.learner import TaskLearner

Tensors = dict[str, Tensor]
States = Callable[[tuple[str, ...], Tensors], tuple[Tensor, Tensor]]  # of texts by factors: (n, V, L, d), mask (n, L)


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


def by_halves(reader: TokenStateReader) -> States:
    """Return what reads texts in batches by length: the encoder as textmeta has it."""

    def states(texts: tuple[str, ...], factors: Tensors) -> tuple[Tensor, Tensor]:
        found = [h.transpose(0, 1) for h in reader.read(texts, factors).unpadded()]
        h = pad_sequence(found, batch_first=True).transpose(1, 2)
        return h, torch.arange(h.shape[2]) < torch.tensor([len(state) for state in found])[:, None]

    return states


def by_peft(reader: TokenStateReader, attention: str) -> States:
    """Return what reads texts by the whole PEFT model, padded to the longest."""
    encoder, how = reader.encoder, {"padding": True, "truncation": True, "return_tensors": "pt"}
    whole = load_pretrained(encoder.settings.model)[0]
    whole.set_attn_implementation(attention)
    model = get_peft_model(whole, encoder.peft_config).to(encoder.device).eval().requires_grad_(False)

    def states(texts: tuple[str, ...], factors: Tensors) -> tuple[Tensor, Tensor]:
        given = dict(encoder.tokenizer(list(texts), max_length=encoder.settings.max_length, **how).to(encoder.device))
        own = {f"base_model.model.{name[:-6]}default.weight": value for name, value in factors.items()}
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=encoder.precision == "bf16"):
            found = functional_call(model, own, (), {**given, "output_hidden_states": True}).hidden_states
        mask = given["attention_mask"].bool()
        h = torch.stack([found[layer].float() for layer in reader.layers], 1)
        return h.masked_fill(~mask[:, None, :, None], 0), mask

    return states


def query_loss(read: States, p: Tensors, e: Episode, steps: int, second: bool, lora: bool) -> tuple[Tensor, Tensor]:
    """Learn a task whose classes have equally many examples, two or more; return its queries' loss and accuracy."""
    batch = TaskBatch.of_episodes([e], p["queries"].device)  # folds follow its order of the texts
    labels, n, ways, shots = batch.labels[0], len(e.support_texts), e.ways, math.log1p(len(e.support_texts) / e.ways)
    factors = {name.removeprefix(LORA): value for name, value in p.items() if name.startswith(LORA)}
    told, right = batch.support.texts, torch.as_tensor(e.query_labels).to(labels)

    def scaled(h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return h, (h.square().mean(-1) + 1e-6).rsqrt() / math.sqrt(h.shape[-1]), mask

    everything = scaled(*read(told if lora else (*told, *e.query_texts), factors))
    support = tuple(part[:n] for part in everything)
    targets = one_hot(labels).double() - 1 / ways
    first = pool(*support, p["queries"]).double()
    each = left_out_nll(first, labels, targets, torch.eye(first.shape[1], dtype=torch.float64), p)
    seen = n / (n + p["log_evidence_half"].exp())
    mixture = (p["view_prior"] - p["log_evidence_strength"].exp() * seen * each).softmax(0)
    nll = left_out_nll(first, labels, targets, mixture[None], p)[0]
    gate = (p["step_gate"][0] + p["step_gate"][1] * shots).sigmoid()
    fast = {name: p[name] for name in p if (LORA_B in name if lora else name == "queries")}
    layers = sorted({layer_of(name.removeprefix(LORA)) for name in fast})
    support = support if second else tuple(part.detach() for part in support)
    for step in range(steps):
        own = fast if second else {name: value.detach().requires_grad_() for name, value in fast.items()}
        now = {name: value if second else value.detach() for name, value in p.items()} | own
        if lora:
            support = scaled(*read(told, {name: now[LORA + name] for name in factors}))
        loss = neighbourhood_loss(pool(*support, now["queries"]), labels, p)
        gradients = torch.autograd.grad(loss, list(own.values()), create_graph=second)
        far = gate * (loss if second else loss.detach()).clamp(max=1.0)
        for (name, value), g in zip(list(fast.items()), gradients, strict=True):
            size = p["log_step_sizes"][step].exp()[:, None]
            if lora:
                size = p["lora_log_step_sizes"][step, layers.index(layer_of(name.removeprefix(LORA)))].exp()
            move = far * size * g * (g.square().mean((-2, -1) if lora else -1, keepdim=True) + 1e-8).rsqrt()
            fast[name] = value - move - p["pull"].sigmoid() * (value - p[name])
    if lora:
        everything = scaled(*read((*told, *e.query_texts), {name: {**p, **fast}[LORA + name] for name in factors}))
    u = pool(*everything, {**p, **fast}["queries"])
    x = (centred(u, u[:n], p) * mixture.sqrt()[:, None]).flatten(1)
    system = x[:n] @ x[:n].T + p["log_penalty"].exp() * torch.eye(n, dtype=torch.float64)
    of_task = torch.stack([nll.new_tensor(value) for value in (1, shots, math.log(ways / 5), 1)] + [nll])
    logits = (p["temperature"].double() @ of_task).exp() * (x[n:] @ x[:n].T @ torch.linalg.solve(system, targets))
    return cross_entropy(logits, right), (logits.argmax(1) == right).double().mean()


def loop(read: States, leaves: Tensors, episodes: list[Episode], steps: int, second: bool, lora: bool) -> tuple:
    """Return the gradient summed over the tasks, one after another, and their accuracies."""
    total, accuracies = {name: torch.zeros_like(value) for name, value in leaves.items()}, []
    with leaves["queries"].device:  # what is made is made there
        for episode in episodes:
            loss, accuracy = query_loss(read, leaves, episode, steps, second, lora)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, part in zip(leaves, found, strict=True):
                total[name] += 0 if part is None else part
            accuracies.append(accuracy)
    return total, torch.stack(accuracies)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a local corpus with columns text and label")
    parser.add_argument("--adapt", choices=["pooling", "lora"], default="pooling")
    parser.add_argument("--algorithms", nargs="+", choices=["fomaml", "maml"], default=["fomaml", "maml"])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default=EncoderSettings().model)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    corpus = load_corpus(CorpusSettings(arguments.data)) if arguments.data else load_bundled()[0]
    sampler, lora = EpisodeSampler(corpus, EpisodeSettings(5, 5, 5), seed=0), arguments.adapt == "lora"
    settings = EncoderSettings(arguments.model, max_length=64)
    encoder = Encoder(settings, device=arguments.device, precision=arguments.precision)
    on_gpu = encoder.device.type == "cuda"
    readers = {"fresh": (fresh := TokenStateReader(encoder)), "cached": (cached := TokenStateReader(encoder))}
    learner = LearnerSettings(layers=fresh.layers, adapt=arguments.adapt)
    start = Initialisation.start(encoder.factor_shapes, encoder.hidden_size, learner, seed=0)
    generator = torch.Generator().manual_seed(0)  # away from the start, where LoRA's B is 0 and A has no gradient
    moved = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in start.tensors().items()
    }
    leaves = {name: value.to(encoder.device).requires_grad_() for name, value in moved.items()}
    adapter = replace(Adapter.of(fresh, learner, start), initialisation=start.with_tensors(leaves))
    sides_of_time = [f"{name}, ms" for name in (*readers, "loop")] if on_gpu else []
    rows = [("algorithm", "tasks", "loop to fresh", "loop to cached", "distance of the gradients", *sides_of_time)]
    for algorithm, tasks in itertools.product(arguments.algorithms, arguments.tasks):
        episodes, run, second = sampler.take(tasks), ALGORITHMS[algorithm].gradient, algorithm == "maml"
        cached.cache([text for e in episodes for text in (*e.support_texts, *e.query_texts)])
        read = by_peft(fresh, "eager" if second else "sdpa") if lora else by_halves(fresh)
        sides = {name: partial(run, TaskLearner(reader, adapter), episodes, leaves) for name, reader in readers.items()}
        sides["loop"] = partial(loop, read, leaves, episodes, learner.steps, second, lora)
        mine, (theirs, accuracies) = sides["fresh"](), sides["loop"]()
        same = torch.allclose(mine.accuracy.double(), accuracies)
        assert same or arguments.precision != "no", f"{mine.accuracy}, but the loop's {accuracies}"
        one, two = (torch.cat([part[name].flatten() for name in leaves]) for part in (mine.gradient, theirs))
        times = alternate(sides, arguments.repeats, f"{algorithm}, {tasks} tasks")
        ratios = [f"{median(times['loop']) / median(times[name]):.2f}" for name in readers]
        ms = [f"{1000 * median(times[name]):.1f}" for name in sides] if on_gpu else []
        rows.append((algorithm, str(tasks), *ratios, f"{float((one - two).norm() / two.norm()):.0e}", *ms))
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {arguments.threads} threads"
    print(f"{corpus.name}, steps on {arguments.adapt}, precision {arguments.precision}, {where}\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
