"""The time left for whatever lasts."""

import pytest
from command import refused

from pipelines.run.progress import Lines, console, duration


def test_dry_run_is_refused_by_naming_check(config_file) -> None:
    assert "`layerbudget check CONFIG` counts prompts and tokens" in refused("run", config_file(), "--dry-run")


def test_where_there_is_no_terminal_a_line_comes_now_and_then(monkeypatch) -> None:
    lines, now = [], [0.0]
    monkeypatch.setattr(console, "print", lambda text, **options: lines.append(text))
    advance = Lines("labels", 1000, clock=lambda: now[0])
    for second in range(1, 101):
        now[0] = second
        advance(5)
    assert lines == [
        "  labels: 150 of 1,000, 2.8 min left",
        "  labels: 300 of 1,000, 2.3 min left",
        "  labels: 450 of 1,000, 1.8 min left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "1.5 min"), (5000, "83.3 min"), (36000, "10.0 h")]
)
def test_durations_are_told_in_the_unit_that_suits(seconds: float, text: str) -> None:
    assert duration(seconds) == text
