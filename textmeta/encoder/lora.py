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

from textmeta.data.labels import whole_number
from textmeta.errors import EncoderError

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
        for name in ("layers", "rank", "alpha"):
            if (given := getattr(self, name)) is not None:
                whole_number(f"lora {name}", given, 1, MOST)


def lora_config(model: PreTrainedModel, layers_name: str, first_layer: int, settings: LoraSettings) -> LoraConfig:
    """Return PEFT's configuration, with the full name of every linear layer that carries LoRA, from a first layer on.

    ``layers_name`` is that of the list of the model's layers (``encoder.layer``). EncoderError if no linear layer's
    name has one of the endings.
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


# what using_factors was given, for the forward in progress: factors, task of each row, folded weights
_USED: ContextVar[tuple[Mapping[str, Tensor], Tensor | None, dict[str, Tensor]] | None]
_USED = ContextVar("textmeta_factors", default=None)


@contextmanager
def using_factors(
    tensors: Mapping[str, Tensor], row_task: Tensor | None = None, folded: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """Let every :class:`LoraLinear` in a forward read its factors from ``tensors``, in this thread alone.

    These are weights by name, (out, in), or (tasks, out, in) for one a task; then ``row_task`` (rows,) int64 is the
    task of each row of the batch. In ``folded`` weights with LoRA in them are kept, by the name of their factor A, for
    further forwards with the same factors.
    """
    token = _USED.set((tensors, row_task, {} if folded is None else folded))
    try:
        yield
    finally:
        _USED.reset(token)


class LoraLinear(nn.Module):
    """A linear map with LoRA, whose factors are those in use, by name; without any it is the map itself.

    The names of the factors are PEFT's: that of the map, with ``.lora_A.weight`` and ``.lora_B.weight`` after it.
    Factors that all tasks share are folded into the weight: one product instead of three.
    """

    def __init__(self, base: nn.Linear, name: str, settings: LoraSettings) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.names = f"{name}.lora_A.weight", f"{name}{LORA_B}weight"
        self.scale = settings.alpha / settings.rank

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, length, in) to (rows, length, out)."""
        used = _USED.get()
        if used is None:
            return linear(x, self.weight, self.bias)
        tensors, row_task, folded = used
        first, second = (tensors[name] for name in self.names)
        if first.ndim == second.ndim == 2:
            key, device = self.names[0], x.device.type
            if key not in folded:
                # not in half precision: an update is small beside the weight
                with torch.autocast(device, enabled=False):
                    weight = torch.addmm(self.weight, second, first, alpha=self.scale)
                if torch.is_autocast_enabled(device) and not weight.requires_grad:  # else gradients add up in float32
                    weight = weight.to(torch.get_autocast_dtype(device))
                folded[key] = weight
            return linear(x, folded[key], self.bias)
        branch = _product(_product(x, first, row_task), second, row_task)
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

    Returns the shape of each factor by name: ``encoder.layer.3.attention.self.query.lora_A.weight`` → (rank, in) and
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
    start = {name: torch.zeros(shape) for name, shape in sorted(shapes.items())}
    for name, value in start.items():
        if ".lora_A." in name:
            start[name] = (torch.rand(value.shape, generator=generator) * 2 - 1) * (1 / math.sqrt(value.shape[1]))
    return start


def layer_of(factor: str) -> str:
    """Return the layer of a LoRA factor, up to the first number of its name.

    ``encoder.layer.3.attention.self.query.lora_B.weight`` → ``encoder.layer.3``.
    """
    layer = re.match(r".*?\.\d+(?=\.)", factor)
    return layer.group() if layer else factor
