import pytest
import torch

from backbone.left_padding import in_halves
from oracle.batches import packed, spread

ITEMS = "abcdefg"


@pytest.mark.parametrize(
    ("items", "count", "picked"),
    [
        ("", -1, ""),
        (ITEMS, -1, ""),
        (ITEMS, 1, "g"),
        (ITEMS, 2, "ag"),
        (ITEMS, 3, "adg"),
        (ITEMS, 1000, ITEMS),
    ],
)
def test_spread_picks_each_item_once(items, count, picked) -> None:
    assert "".join(spread(items, count)) == picked


def test_spread_covers_all_when_more_are_asked_for() -> None:
    for size in range(12):
        for count in range(2 * size + 2):
            picked = spread(range(size), count)
            assert len(picked) == len(set(picked)) == min(size, count)
            assert picked == sorted(picked)


def test_batches_hold_about_the_same_tokens() -> None:
    lengths = [30, 20, 10, 10, 10, 10, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    batches = list(packed(lengths, int, batch_size=3))
    assert [length for batch in batches for length in batch] == lengths
    assert batches == [[30], [20], *([[10]] * 4), *([[2, 2, 2]] * 3), [2]]  # the median is 2: room for 6
    assert [len(batch) for batch in packed([9] * 2 + [1] * 30 + [9] * 40, int, batch_size=2)][:4] == [2, 8, 8, 8]
    assert max(len(batch) for batch in packed([9] * 9 + [0] * 100, int, 2)) == 8
    assert list(packed([], int, 3)) == []


def test_batches_that_do_not_fit_are_halved_until_they_do() -> None:
    sizes = []

    def run(rows):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return [row * 10 for row in rows]

    assert in_halves([1, 2, 3, 4, 5], run) == [10, 20, 30, 40, 50]
    assert sizes == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        in_halves([1], lambda rows: run([1, 2, 3]))
