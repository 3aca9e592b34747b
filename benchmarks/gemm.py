"""What the matrix products of a computation would cost alone, and where its time goes."""

import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import timed
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from textmeta.model.encoder import Encoder

__all__ = ["categories_of_time", "matrix_product_seconds"]

aten = torch.ops.aten
# where the two factors stand among the arguments
PRODUCTS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2)}
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "fused attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    "GELU": ("aten::gelu",),
    "layer norm": ("aten::native_layer_norm",),
    "softmax": ("aten::_softmax",),
    "copies": ("aten::copy_", "aten::cat", "aten::index_select", "aten::fill_", "aten::zero_"),
}


class _Shapes(TorchDispatchMode):
    """Counts the matrix products that run, by shapes, strides and type."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            factors = [args[i] for i in PRODUCTS[func]]
            self.counts[tuple((tuple(f.shape), tuple(f.stride()), f.dtype) for f in factors)] += 1
        return func(*args, **(kwargs or {}))


def matrix_product_seconds(run: Callable[[], object], encoder: Encoder) -> tuple[float, float]:
    """Return the seconds that the matrix products of ``run`` take alone, and their number of operations.

    Each distinct product (shapes, strides, type) is timed on numbers of its own, five times, and its median counts as
    often as it occurs.
    """
    with _Shapes() as shapes:
        run()
    seconds = operations = 0.0
    for factors, count in shapes.counts.items():
        a, b = (
            torch.randn(shape, dtype=dtype, device=encoder.device).as_strided(shape, stride)
            if _is_dense(shape, stride)
            else torch.randn(shape, dtype=dtype, device=encoder.device)
            for shape, stride, dtype in factors
        )
        product = partial(torch.bmm if a.ndim == 3 else torch.mm, a, b)
        # a GPU is sent many before it is waited for, so that sending and waiting do not count
        calls = 50 if encoder.device.type == "cuda" else 1
        seconds += count * statistics.median(timed(partial(_repeat, product, calls), encoder) for _ in range(5)) / calls
        operations += count * 2 * a.numel() * b.shape[-1]
    return seconds, operations


def categories_of_time(run: Callable[[], object], encoder: Encoder) -> dict[str, float]:
    """Return the share of each kind of operation in the time that ``run`` spends in operations."""
    cuda = encoder.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as result:
        run()
    totals: Counter[str] = Counter()
    for event in result.key_averages():
        if cuda and not event.key.startswith("aten::"):
            continue  # a kernel, whose time the operation has that launched it
        kind = next((k for k, starts in KINDS.items() if event.key.startswith(starts)), "all else")
        totals[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {kind: value / totals.total() for kind, value in totals.most_common()}


def _repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether strides cover the numbers without gaps or repetition, as a transposed matrix's do."""
    expected = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: pair[1]):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True
