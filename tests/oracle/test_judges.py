import sys

import pytest

from oracle.judges import JudgeError, check_judge, may_become_exact, score


@pytest.mark.parametrize(
    ("judge", "answer", "reference", "expected"),
    [
        ("exact", " Paris. ", "paris", 1),
        ("exact", "Paris, France", "Paris", 0),
        ("number", "so the answer is 1,234", "1234", 1),
        ("number", "12 or 13", "12", 0),
        ("number", "no idea", "12", 0),
        ("number", "-3.0", "-3", 1),
        ("contains", "It is PARIS now", "Paris", 1),
        ("contains", "London", "Paris", 0),
        ("agreement", "x", "ignored", 0),
        ("agreement", "full answer", "ignored", 1),
        ("rouge_l", "the cat sat", "the cat sat", 1),
        ("rouge_l", "the dog sat", "the cat sat", 2 / 3),
        ("rouge_l", "", "the cat sat", 0),
    ],
)
def test_scores(judge, answer, reference, expected) -> None:
    assert score(judge, answer, reference, "full answer") == pytest.approx(expected)


@pytest.mark.parametrize(
    "whole", ["Paris", "PARIS.", "paris!?", "Paris, France", "London", "Par is", "Paris. .", "", "..."]
)
@pytest.mark.parametrize("reference", ["Paris", "paris.", "Par", "", "..."])
def test_what_can_no_longer_become_exact_never_does(whole, reference) -> None:
    begun = [may_become_exact(whole[:end].strip(), reference) for end in range(len(whole) + 1)]
    assert begun[0], "nothing is said yet"
    assert begun == sorted(begun, reverse=True), "what has parted stays parted"
    assert begun[-1] or not score("exact", whole, reference, ""), "a right answer has never parted"
    assert not may_become_exact("Lon", "Paris")


def test_a_judge_of_the_users_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_judges.py").write_text(
        "def half(answer, reference, full):\n    return 0.5\n\ndef wild(answer, reference, full):\n    return 2\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert score("my_judges:half", "a", "b", "c") == 0.5
    with pytest.raises(JudgeError, match=r"scored 2.0 .* scores lie in \[0, 1\]"):
        score("my_judges:wild", "a", "b", "c")
    with pytest.raises(JudgeError, match="cannot import the judge 'my_judges:none'"):
        check_judge("my_judges:none")
