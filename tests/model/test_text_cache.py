import torch
from torch import Tensor

from textmeta.model.text_cache import TextCache


def compute(texts: list[str]) -> list[Tensor]:
    return [torch.full((256,), float(len(text))) for text in texts]  # 1 KiB each


def test_each_text_is_computed_once_and_comes_back_in_its_place() -> None:
    cache, asked = TextCache(1), []

    def counted(texts: list[str]) -> list[Tensor]:
        asked.append(texts)
        return compute(texts)

    assert [int(t[0]) for t in cache.get(["a", "bb", "a"], counted)] == [1, 2, 1]
    assert [int(t[0]) for t in cache.get(["ccc", "bb"], counted)] == [3, 2]
    assert asked == [["a", "bb"], ["ccc"]]


def test_the_texts_not_asked_for_the_longest_go() -> None:
    cache = TextCache(1)  # room for 1,024 texts
    cache.get([str(n) for n in range(1024)], compute)
    cache.get(["0"], compute)  # now the youngest
    cache.get(["new"], compute)
    assert len(cache) == 1024
    again: list[list[str]] = []
    cache.get(["0", "1", "new"], lambda texts: again.append(texts) or compute(texts))  # type: ignore[func-returns-value]
    assert again == [["1"]]


def test_nothing_is_kept_where_there_is_no_room_or_no_wish() -> None:
    for cache, remember in ((TextCache(0), True), (TextCache(1), False)):
        assert len(cache.get(["a"], compute, remember)) == 1
        assert len(cache) == 0
