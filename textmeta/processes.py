"""Several processes that train together, as torchrun or ``accelerate launch`` has started them."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from textmeta.errors import LostProcessError, SettingsError

if TYPE_CHECKING:
    from accelerate import Accelerator

LONGEST_WAIT = timedelta(minutes=10)  # for one that hangs; one that has ended is noticed at once

T = TypeVar("T")
R = TypeVar("R")


def join_processes(longest_wait: timedelta | None = None, **settings: Any) -> "Accelerator":
    """Join the other processes of a run, if there are any: by NCCL on GPUs, by gloo on CPUs.

    One that hangs is waited for 10 minutes, or as long as is given; further settings are accelerate's. SettingsError if
    this one was started as one of several, but would train alone.
    """
    from accelerate import Accelerator  # noqa: PLC0415 - nobody else needs it
    from accelerate.utils import InitProcessGroupKwargs  # noqa: PLC0415

    on_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    with exchange():
        wait = InitProcessGroupKwargs(timeout=longest_wait or LONGEST_WAIT)
        joined = Accelerator(cpu=on_cpus, kwargs_handlers=[wait], **settings)
    if joined.num_processes == 1 < int(os.environ.get("WORLD_SIZE", "1")):
        how = "start them with torchrun or `accelerate launch`; to train on CPUs, set ACCELERATE_USE_CPU=true"
        given = os.environ["WORLD_SIZE"]
        raise SettingsError(f"WORLD_SIZE is {given}, but this process would train alone: {how}; for one, unset it")
    return joined


@contextmanager
def exchange() -> Iterator[None]:
    """Turn the failure of an exchange with other processes into a LostProcessError."""
    try:
        yield
    except RuntimeError as error:  # as those of gloo and NCCL are
        if os.environ.get("WORLD_SIZE", "1") == "1" or isinstance(error, torch.OutOfMemoryError):
            raise
        told = "lost another process of this run, which has ended or hangs; if it has said why, that is shown too"
        raise LostProcessError(f"{told} ({str(error).strip():.200})") from error


def shared_out(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """Return what ``work`` makes of each of the items; every process does its share, and gets what the others made."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(work(items))
    number, count = dist.get_rank(), dist.get_world_size()
    own = list(work(items[number::count]))
    parts: list[list[R]] = [[]] * count
    with exchange():
        dist.all_gather_object(parts, own)
    return [parts[position % count][position // count] for position in range(len(items))]
