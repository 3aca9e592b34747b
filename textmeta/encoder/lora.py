"""LoRA whose factors travel with the call, and may differ from task to task in one forward.

The linear maps that carry LoRA become :class:`LoraLinear`, which reads its factors from a context variable. So a module
is never changed to switch tasks (safe under threads), gradients of any order flow to the factors that were passed, and
a factor with a leading task dimension applies each task's own weight to that task's rows. Names are PEFT's.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from textmeta.errors import EncoderError, SettingsError

__all__ = ["LORA_B", "TARGETS", "LoraSettings", "inject", "layer_of", "lora_config", "using_factors", "zero_start"]

MOST = 10**6  # layers, rank, alpha
LORA_B = ".lora_B."  # in the names of the factors B, the only ones that inner steps change

# Names of the linear layers that carry LoRA, by model type: attention's query and value, as in the LoRA paper.
TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), ("query", "value")),
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("attn.q", "attn.v"),
    "modernbert": ("Wqkv",),
    # query and key projections also see the relative position table, whose batch is 1
    **dict.fromkeys(("deberta", "deberta-v2"), ("attention.output.dense", "intermediate.dense", "output.dense")),
}


@dataclass(frozen=True)
class LoraSettings:
    """The low-rank adapter of Hu et al. (2021): ΔW = (alpha / rank) · B A.

    Args:
        layers: how many of the upper layers carry LoRA; by default the upper half.
        rank: rank of the update.
        alpha: its scale; the branch is multiplied by ``alpha / rank``.
        targets: endings of the names of the linear layers that carry LoRA; by default a table by model type
            (query and value for BERT and its kin).
    """

    layers: int | None = None
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("layers", "rank", "alpha"):
            given = getattr(self, name)
            if given is not None and not 1 <= given <= MOST:
                raise SettingsError(f"lora {name} must be from 1 to {MOST}, given {given!r:.40}")


def lora_config(model: PreTrainedModel, layers_name: str, first_layer: int, settings: LoraSettings) -> LoraConfig:
    """Return PEFT's configuration: the full name of every linear layer that carries LoRA.

    Args:
        model: the transformer.
        layers_name: name of the list of its layers (``encoder.layer``).
        first_layer: number of the lowest layer that carries LoRA.
        settings: of the adapter.

    Raises:
        EncoderError: if no linear layer's name has one of the endings.
    """
    layers = model.get_submodule(layers_name)
    maps = {
        f"{layers_name}.{number}.{name}"
        for number in range(first_layer, len(layers))  # type: ignore[arg-type]
        for name, module in layers.get_submodule(str(number)).named_modules()
        if isinstance(module, nn.Linear)
    }
    endings = settings.targets or TARGETS.get(model.config.model_type, ())
    targets = sorted(name for name in maps if any(f".{name}".endswith(f".{ending}") for ending in endings))
    if not targets:
        raise EncoderError(
            f"no linear layer of this {model.config.model_type} encoder ends in {endings or '(no default known)'}; "
            f"set lora targets to endings of these: {', '.join(sorted(maps)[:12])} …"
        )
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0, bias="none")


@dataclass(frozen=True)
class _Active:
    """The factors of the forward in progress: what :func:`using_factors` was given."""

    tensors: Mapping[str, Tensor]
    row_task: Tensor | None
    folded: dict[str, Tensor]


_ACTIVE: ContextVar[_Active | None] = ContextVar("textmeta_active", default=None)


@contextmanager
def using_factors(
    tensors: Mapping[str, Tensor], row_task: Tensor | None = None, folded: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """Let every :class:`LoraLinear` in a forward read its factors from ``tensors``, in this thread alone.

    Args:
        tensors: factor name to weight, (out, in), or (tasks, out, in) for one weight a task.
        row_task: (rows,) int64, the task of each row of the batch; needed where a factor has a task dimension.
        folded: where weights with LoRA in them are kept by the name of their factor A, for further forwards with the
            same factors; those that all tasks share.
    """
    token = _ACTIVE.set(_Active(tensors, row_task, {} if folded is None else folded))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


class LoraLinear(nn.Module):
    """A linear map with LoRA, whose factors are those in use, by name; without any it is the map itself.

    Factors that all tasks share are folded into the weight: one product instead of three.

    Args:
        base: the map.
        name: of its factors, before ``.lora_A.weight`` and ``.lora_B.weight``, as PEFT has them.
        settings: of the adapter.
    """

    def __init__(self, base: nn.Linear, name: str, settings: LoraSettings) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.names = f"{name}.lora_A.weight", f"{name}{LORA_B}weight"
        self.scale = settings.alpha / settings.rank

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, length, in) to (rows, length, out)."""
        active = _ACTIVE.get()
        if active is None:
            return linear(x, self.weight, self.bias)
        first, second = (active.tensors[name] for name in self.names)
        if first.ndim == second.ndim == 2:
            key, device = self.names[0], x.device.type
            if key not in active.folded:
                # not in half precision: an update is small beside the weight
                with torch.autocast(device, enabled=False):
                    weight = torch.addmm(self.weight, second, first, alpha=self.scale)
                if torch.is_autocast_enabled(device) and not weight.requires_grad:  # else gradients add up in float32
                    weight = weight.to(torch.get_autocast_dtype(device))
                active.folded[key] = weight
            return linear(x, active.folded[key], self.bias)
        branch = _product(_product(x, first, active.row_task), second, active.row_task)
        return linear(x, self.weight, self.bias) + self.scale * branch


def _product(x: Tensor, weight: Tensor, row_task: Tensor | None) -> Tensor:
    """Return x (rows, length, in) times a weight (out, in), or times that of each row's task."""
    if weight.ndim == 2:
        return linear(x, weight)
    assert row_task is not None, "a factor with a task dimension needs the task of each row"
    # not weight[row_task]: on a CPU its backward adds up in an order that differs from run to run
    return torch.bmm(x, weight.index_select(0, row_task).transpose(1, 2))


def inject(model: PreTrainedModel, targets: Iterable[str], settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Make linear maps of a model :class:`LoraLinear`, in place, and the model's own weights constant.

    Args:
        model: the transformer.
        targets: names of the maps.
        settings: of the adapter.

    Returns:
        Shape of each factor by name: ``encoder.layer.3.attention.self.query.lora_A.weight`` → (rank, in) and
        ``… .lora_B.weight`` → (out, rank). With the prefix ``base_model.model.`` these are PEFT's own names.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for target in sorted(targets):
        module = LoraLinear(model.get_submodule(target), target, settings)  # type: ignore[arg-type]
        model.set_submodule(target, module)
        out, into = module.weight.shape
        shapes |= zip(module.names, ((settings.rank, into), (out, settings.rank)), strict=True)
    model.requires_grad_(False)
    return shapes


def zero_start(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return the usual start of LoRA: A uniform in ±1/√in (Kaiming with a = √5), B zero, so that ΔW = 0."""
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name, shape in sorted(shapes.items()):
        if ".lora_A." in name:
            bound = 1 / math.sqrt(shape[1])
            start[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        else:
            start[name] = torch.zeros(shape)
    return start


def layer_of(factor: str) -> str:
    """Return the layer of a LoRA factor, up to the first number of its name.

    ``encoder.layer.3.attention.self.query.lora_B.weight`` → ``encoder.layer.3``.
    """
    layer = re.match(r".*?\.\d+(?=\.)", factor)
    return layer.group() if layer else factor
