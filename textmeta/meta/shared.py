"""What is loaded once, and shared by all that ask for the same for as long as one of them holds it."""

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")
_GUARD = Lock()
_LOCKS: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
_HELD: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """Return what was made for a key, if somebody still holds it; else make it, once however many threads ask."""
    with _GUARD:
        lock = _LOCKS.setdefault(key, Lock())
    with lock:
        found: T | None = _HELD.get(key)
        if found is None:
            _HELD[key] = found = make()
        return found
