"""The core as its specification says it: plain loops over one task at a time, nothing taken from the package.

Token states are a list of (V, length, d), a tensor a text. Everything is differentiable.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Task:
    """Texts of one task; labels are those of ``texts``, in the order that folds are made in."""

    texts: list[str]
    labels: list[int]
    ways: int
    names: list[str] | None = None
    unlabelled: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()


def rms_scaled(h: Tensor) -> Tensor:
    return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def unit(p: Tensor) -> Tensor:
    return p / (p.square().sum(-1, keepdim=True) + 1e-12).sqrt()


def views_of(states: list[Tensor], q: Tensor) -> Tensor:
    """Return (n, V, d) u of texts."""
    d, rows = q.shape[1], []
    for text in states:
        row = []
        for h, query in zip(text, q, strict=True):
            attention = (rms_scaled(h) @ query / math.sqrt(d)).softmax(0)
            row.append(unit((attention[:, None] * h).sum(0)))
        rows.append(torch.stack(row))
    return torch.stack(rows) if rows else q.new_zeros(0, *q.shape)


def classes_of(labels: list[int]) -> dict[int, list[int]]:
    return {c: [i for i, label in enumerate(labels) if label == c] for c in sorted(set(labels))}


def class_mean(values: Tensor, labels: list[int]) -> Tensor:
    """Return the mean over classes of the mean of their values (n, …)."""
    return torch.stack([values[rows].mean(0) for rows in classes_of(labels).values()]).mean(0)


def centre_of(u: Tensor, labels: list[int], mu: Tensor, n0: Tensor, extra: Tensor, nu: Tensor) -> Tensor:
    n, r = len(labels), len(extra)
    number = n + nu * r + n0
    if number == 0:
        return torch.zeros_like(mu)
    total = n0 * mu
    if n:
        total = total + n * class_mean(u, labels)
    if r:
        total = total + nu * r * extra.mean(0)
    return total / number


def ridge_fit(z: Tensor, w: Tensor, targets: Tensor, omega: Tensor, penalty: Tensor) -> Tensor:
    """Return (V, d, C): the minimum of Σ ω_i |W·z_i - y_i|² + λ|W|² on the concatenated √w_v z_v, by its equations."""
    n, v, d = z.shape
    x = (w.sqrt()[None, :, None] * z).reshape(n, v * d)
    gram = sum((omega[i] * torch.outer(x[i], x[i]) for i in range(n)), penalty * torch.eye(v * d, dtype=z.dtype))
    right = sum((omega[i] * torch.outer(x[i], targets[i]) for i in range(n)), z.new_zeros(v * d, targets.shape[1]))
    return w.sqrt()[:, None, None] * torch.linalg.solve(gram, right).view(v, d, -1)


def balanced_weights(labels: list[int]) -> Tensor:
    sizes = {c: len(rows) for c, rows in classes_of(labels).items()}
    return torch.tensor([len(labels) / (len(sizes) * sizes[c]) for c in labels], dtype=torch.float64)


def one_hot_targets(labels: list[int], ways: int) -> Tensor:
    """Return (n, C) one-hot - 1/C₁; 0 for classes without examples."""
    present = sorted(set(labels))
    targets = torch.zeros(len(labels), ways, dtype=torch.float64)
    targets[:, present] = -1 / len(present)
    for i, c in enumerate(labels):
        targets[i, c] += 1
    return targets


def fold_evidence(u: Tensor, labels: list[int], ways: int, w: Tensor, numbers: tuple[Tensor, ...]) -> tuple:
    """Return the left-out scores {row: (classes,)}, the classes with two or more examples, and the NLL.

    ``numbers``: μ, n₀, λ, and the scale of the scores.
    """
    mu, n0, penalty, scale = numbers
    several = [c for c, rows in classes_of(labels).items() if len(rows) >= 2]
    if len(several) < 2:
        return {}, several, torch.tensor(float(ways), dtype=torch.float64).log()
    rows_of = {c: classes_of(labels)[c] for c in several}
    folds = min(10, *(len(rows) for rows in rows_of.values()))
    scores, terms = {}, {c: [] for c in several}
    none = u[:0]
    for fold in range(folds):
        left_out = [row for rows in rows_of.values() for place, row in enumerate(rows) if place % folds == fold]
        rest = [i for rows in rows_of.values() for i in rows if i not in left_out]
        own = [several.index(labels[i]) for i in rest]
        m = centre_of(u[rest], own, mu, n0, none, torch.tensor(0.0))
        targets = one_hot_targets(own, len(several))
        fitted = ridge_fit(unit(u[rest] - m), w, targets, balanced_weights(own), penalty)
        for row in left_out:
            scores[row] = torch.einsum("vd,vdc->c", unit(u[row] - m), fitted)
            terms[labels[row]].append(-(scale * scores[row]).log_softmax(0)[several.index(labels[row])])
    return scores, several, torch.stack([torch.stack(part).mean() for part in terms.values()]).mean()


def neighbourhood(u: Tensor, labels: list[int], weights: Tensor, scale: Tensor) -> Tensor:
    """Return the loss; 0 where fewer than two classes have two texts."""
    rows_of = classes_of(labels)
    several = [c for c, rows in rows_of.items() if len(rows) >= 2]
    if len(several) < 2:
        return u.sum() * 0
    means = []
    for c in several:
        terms = []
        for i in rows_of[c]:
            votes = {}
            for other, rows in rows_of.items():
                cosines = [(weights * (u[i] * u[j]).sum(-1)).sum() for j in rows if j != i]
                votes[other] = torch.stack([(scale * cosine).exp() for cosine in cosines]).mean()
            terms.append(-(votes[c] / sum(votes.values())).log())
        means.append(torch.stack(terms).mean())
    return torch.stack(means).mean()


Read = Callable[[list[str], Mapping[str, Tensor]], list[Tensor]]


def adapted(
    task: Task, t: Mapping[str, Tensor], adapt: str, read: Read, second_order: bool = True
) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Return pooling queries, LoRA's factors, and whether steps were taken; ``t`` are the tensors by name."""
    factors = {name.removeprefix("lora."): value for name, value in t.items() if name.startswith("lora.")}
    q = q0 = t["queries"]
    sizes = [len(rows) for rows in classes_of(task.labels).values()]
    if adapt == "none" or sum(size >= 2 for size in sizes) < 2:
        return q, factors, False
    b0 = b = {name: value for name, value in factors.items() if ".lora_B." in name}
    layers = sorted({int(name.split(".")[2]) for name in b})
    k = len(task.labels) / len(sizes)
    gamma = (t["step_gate"][0] + t["step_gate"][1] * math.log(1 + k)).sigmoid()
    delta = t["pull"].sigmoid()
    weights, scale = t["loss_view_weights"].softmax(0), t["loss_log_scale"].exp()
    for step in range(len(t["log_step_sizes"])):
        moving = ([q] if "pooling" in adapt else []) + (list(b.values()) if "lora" in adapt else [])
        moving = [value if value.requires_grad else value.detach().requires_grad_() for value in moving]
        rest = list(moving)
        if "pooling" in adapt:
            q = rest.pop(0)
        if "lora" in adapt:
            b = dict(zip(b, rest, strict=True))
        loss = neighbourhood(views_of(read(task.texts, {**factors, **b}), q), task.labels, weights, scale)
        found = list(torch.autograd.grad(loss, moving, create_graph=True))
        if not second_order:  # gradients and losses of the steps are constants
            found, loss = [g.detach() for g in found], loss.detach()
        far = gamma * torch.minimum(torch.ones_like(loss), loss)
        if "pooling" in adapt:
            g = found.pop(0)
            rms = (g.square().mean(-1, keepdim=True) + 1e-4**2).sqrt()
            alpha = t["log_step_sizes"][step].exp()
            q = q - far * (alpha if alpha.ndim == 2 else alpha[:, None]) * g / rms - delta * (q - q0)
        if "lora" in adapt:
            moved = {}
            for (name, value), g in zip(b.items(), found, strict=True):
                alpha = t["lora_log_step_sizes"][step, layers.index(int(name.split(".")[2]))].exp()
                moved[name] = (
                    value - far * alpha * g / (g.square().mean() + 1e-4**2).sqrt() - delta * (value - b0[name])
                )
            b = moved
    return q, {**factors, **(b if "lora" in adapt else {})}, True


def task_logits(
    task: Task, t: Mapping[str, Tensor], adapt: str, read: Read, rounds: int = 3, head: str = "ridge"
) -> Tensor:
    """Return (queries, C) logits."""
    q0, labels, n, ways = t["queries"], task.labels, len(task.labels), task.ways
    present = len(set(labels))
    k = n / present if present else 0.0
    n0, nu, penalty = t["log_centre_strength"].exp(), t["log_unlabelled_share"].exp(), t["log_penalty"].exp()
    lora = {name.removeprefix("lora."): value for name, value in t.items() if name.startswith("lora.")}

    u = views_of(read(task.texts, lora), q0)
    numbers = (t["centre"], n0, penalty, t["log_evidence_scale"].exp())
    views = q0.shape[0]
    nll = torch.stack([fold_evidence(u, labels, ways, w, numbers)[2] for w in torch.eye(views, dtype=q0.dtype)])
    sizes = [len(rows) for rows in classes_of(labels).values() if len(rows) >= 2]
    n2 = sum(sizes) if len(sizes) >= 2 else 0
    s = n2 / (n2 + t["log_evidence_half"].exp())
    w = (t["view_prior"] - t["log_evidence_strength"].exp() * s * nll).softmax(0)
    nll_of_mixture = fold_evidence(u, labels, ways, w, numbers)[2]

    q, factors, stepped = adapted(task, t, adapt, read)
    support, extra, queries = (read(list(part), factors) for part in (task.texts, task.unlabelled, task.queries))
    u, ur, uq = (views_of(part, q) for part in (support, extra, queries))
    m = centre_of(u, labels, t["centre"], n0, ur, nu)
    z, zr, zq = (unit(part - m) for part in (u, ur, uq))
    fitted = q0.new_zeros(*q0.shape, ways)
    if head == "prototype":
        for c, rows in classes_of(labels).items():
            fitted[..., c] = w[:, None] * unit(z[rows].sum(0))
    elif present >= 2:
        fitted = ridge_fit(z, w, one_hot_targets(labels, ways), balanced_weights(labels), penalty)
    inputs = [1.0, math.log(1 + k), math.log(ways / 5), float(stepped), nll_of_mixture]
    temperature = sum(c * x for c, x in zip(t["temperature"], inputs, strict=True)).exp()

    by_name = {"unlabelled": 0.0, "queries": 0.0}
    if task.names is not None:
        us, un = views_of(support, q0), views_of(read(task.names, factors), q0)
        first = {"unlabelled": views_of(extra, q0), "queries": views_of(queries, q0)}
        centre = centre_of(us, labels, t["centre"], n0, first["unlabelled"], nu)
        none = un[:0]
        strength = t["log_name_centre_strength"].exp()
        name = unit(un - centre_of(un, list(range(ways)), t["name_centre"], strength, none, nu))
        layer = t["name_view_weights"].softmax(0)

        def cosines(texts: Tensor) -> Tensor:
            return torch.einsum("nvd,v,cvd->nc", unit(texts - centre), layer, name)

        tn = t["log_name_scale"].exp()
        if present >= 2:
            terms = -(tn * cosines(us)).log_softmax(-1)[range(n), labels]
            evidence = math.log(ways) - class_mean(terms, labels)
            b = t["name_gate"]
            factor = tn * (b[0] + b[1] * evidence * math.sqrt(min(n, 25)) + b[2] * math.log(k)).exp()
        else:
            factor = t["log_zero_shot_scale"].exp()
        by_name = {part: factor * cosines(texts) for part, texts in first.items()}

    def logits(part: str, texts: Tensor) -> Tensor:
        return temperature * torch.einsum("nvd,vdc->nc", texts, fitted) + by_name[part]

    if task.unlabelled and head == "ridge":
        r0, r1, r2 = t["unlabelled_weight"]
        rho = (r0 + r1 * math.log(1 + k) + r2 * math.log(1 + len(task.unlabelled) / (n + ways))).exp()
        hard = [[float(c == label) for c in range(ways)] for label in labels]
        hard = torch.tensor(hard, dtype=q0.dtype).view(n, ways)
        own = balanced_weights(labels) * (present >= 2)  # one class alone is nothing to regress on
        for _ in range(rounds):
            p = logits("unlabelled", zr).softmax(-1)
            confidence = 1 + (p * p.log()).sum(-1) / math.log(ways)
            omega = torch.cat([own, rho * confidence])
            fitted = ridge_fit(torch.cat([z, zr]), w, torch.cat([hard, p]) - 1 / ways, omega, penalty)
    return logits("queries", zq)
