"""Which prompts stand for a run: a rule that cannot be bent towards good ones."""

import numpy as np

from pipelines.evaluation.examples import shown_rows

TASKS = ["a", "a", "b", "a", "b", "c"]


def _worse(*rows: int) -> np.ndarray:
    return np.isin(np.arange(len(TASKS)), rows)


def test_the_first_of_each_kind_comes_first_then_the_second_of_each() -> None:
    assert shown_rows(TASKS, _worse(), 3) == [0, 2, 5]
    assert shown_rows(TASKS, _worse(), 5) == [0, 2, 5, 1, 4]
    assert shown_rows(TASKS, _worse(), 9) == [0, 2, 5, 1, 4, 3]


def test_a_worse_answer_takes_the_last_place_unless_one_is_shown_already() -> None:
    assert shown_rows(TASKS, _worse(3, 4), 3) == [0, 2, 4]
    assert shown_rows(TASKS, _worse(2, 4), 3) == [0, 2, 5]
