import pytest

from oracle.spread import spread

ITEMS = "abcdefg"


@pytest.mark.parametrize(
    ("items", "count", "picked"),
    [
        ("", -1, ""),
        ("", 0, ""),
        ("", 3, ""),
        ("a", 0, ""),
        ("a", 1, "a"),
        ("a", 2, "a"),
        (ITEMS, -1, ""),
        (ITEMS, 0, ""),
        (ITEMS, 1, "g"),
        (ITEMS, 2, "ag"),
        (ITEMS, 3, "adg"),
        (ITEMS, 7, ITEMS),
        (ITEMS, 8, ITEMS),
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
