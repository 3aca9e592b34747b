"""What was computed once per text, kept up to a limit of memory; of the texts, those not asked for the longest go."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["TextCache"]


class TextCache:
    """A least-recently-used cache of tensors by text; safe under threads.

    Args:
        limit_mb: memory limit, in MiB; 0 keeps nothing.
    """

    def __init__(self, limit_mb: int) -> None:
        self._limit = limit_mb * 2**20
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of texts in it."""
        return len(self._tensors)

    def get(
        self, texts: Sequence[str], compute: Callable[[list[str]], list[Tensor]], remember: bool = True
    ) -> list[Tensor]:
        """Return the tensor of each text.

        Args:
            texts: in any order, repeated or not.
            compute: makes the tensors of those that are not here, each text once.
            remember: whether to keep these.
        """
        with self._lock:
            found = {text: self._tensors[text] for text in texts if text in self._tensors}
            for text in found:
                self._tensors.move_to_end(text)
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            computed = dict(zip(missing, compute(missing), strict=True))
            found |= computed
            if remember:
                with self._lock:
                    for text, tensor in computed.items():
                        self._keep(text, tensor)
        return [found[text] for text in texts]

    def _keep(self, text: str, tensor: Tensor) -> None:
        if self._limit == 0 or text in self._tensors:  # another thread was faster
            return
        self._tensors[text] = tensor
        self._bytes += tensor.nbytes
        while self._bytes > self._limit:
            _, oldest = self._tensors.popitem(last=False)
            self._bytes -= oldest.nbytes
