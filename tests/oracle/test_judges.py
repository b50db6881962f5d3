import sys

import pytest

from oracle.judges import JudgeError, check_judge, may_become_exact, score
from oracle.prompts import Prompt
from oracle.text_normalisation import last_number, words

SCORES = [
    ("exact", " Paris. ", "paris", 1),
    ("exact", "Paris, France", "Paris", 0),
    ("exact", "Paris. !", "Paris", 1),
    ("exact", "-", "+", 0),
    ("exact", "!", "?", 0),
    ("exact", "+", "+", 1),
    ("exact", "C", "C++", 0),
    ("exact", "c++.", "C++", 1),
    ("exact", "f(x", "f(x)", 0),
    ("exact", "50", "50%", 0),
    ("exact", "", "+", 0),
    ("exact", "STRASSE", "straße", 1),
    ("exact", "Cafe\u0301", "café", 1),
    ("exact", "cafe", "café", 0),
    ("exact", "東京。", "東京", 1),
    ("exact", "\u00a0Москва!\n", "москва", 1),
    ("contains", "It is PARIS now", "Paris", 1),
    ("contains", "London", "Paris", 0),
    ("contains", "", "Paris", 0),
    ("contains", "C", "C++", 0),
    ("contains", "un cafe\u0301 noir", "CAFÉ", 1),
    ("contains", "a cafe\u0301", "cafe", 0),
    ("contains", "首都は東京です", "東京", 1),
    ("agreement", "x", "ignored", 0),
    ("agreement", "full answer", "ignored", 1),
    ("agreement", "Full answer", "", 0),
    ("rouge_l", "the cat sat", "the cat sat", 1),
    ("rouge_l", "the dog sat", "the cat sat", 2 / 3),
    ("rouge_l", "", "the cat sat", 0),
    ("rouge_l", "...", "the cat sat", 0),
    ("rouge_l", "The Cats\nSITTING.", "the cat sits", 1),
    ("rouge_l", "Привет, мир", "привет мир!", 1),
    ("rouge_l", "東京は首都", "東京は首都です", 10 / 12),
    ("rouge_l", "カ\u3099ス", "ガス", 1),
    ("rouge_l", "हिन्दी भाषा", "हिन्दी", 2 / 3),
    ("rouge_l", "سلام", "وداع", 0),
    ("number", "so the answer is 1,234", "1234", 1),
    ("number", "12 or 13", "12", 0),
    ("number", "no idea", "12", 0),
    ("number", "", "12", 0),
    ("number", "-3.0", "-3", 1),
    ("number", "3-5", "-5", 0),
    ("number", "3/4", "4", 0),
    ("number", "1,5", "15", 0),
    ("number", "3–5 days", "3-5", 1),
    ("number", "about 5-2=3", "3", 1),
    ("number", "0.75", "3/4", 1),
    ("number", "11:45", "12:45", 0),
    ("number", "١٢", "12", 1),
]


@pytest.mark.parametrize(("judge", "answer", "reference", "expected"), SCORES)
def test_scores_of_awkward_texts(judge, answer, reference, expected) -> None:
    assert score(judge, answer, reference, "full answer") == pytest.approx(expected)


SIGNS = (".", "+", "👍")
AWKWARD = ["", " \n", *SIGNS, "C++", "Paris", "Straße", "café", "cafe\u0301", "東京", "Привет", "x²", "3-5", "½"]

UNUSABLE = {(judge, text) for judge in ("exact", "contains", "rouge_l", "number") for text in ("", " \n")} | {
    *(("rouge_l", text) for text in SIGNS),
    *(("number", text) for text in AWKWARD if text not in ("3-5", "½")),
}


@pytest.mark.parametrize("judge", ["exact", "contains", "rouge_l", "number", "agreement"])
@pytest.mark.parametrize("reference", AWKWARD)
def test_right_answers_score_1_and_no_reference_fits_all(judge, reference) -> None:
    if (judge, reference) in UNUSABLE:
        with pytest.raises(JudgeError, match=r"holds no (word|number|letter or sign); the judge"):
            score(judge, "anything 5", reference, "")
    else:
        scores = [score(judge, answer, reference, reference) for answer in (reference, "quite another text 77")]
        assert scores == [1, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234,567.89", [1234567.89]),
        ("1.234,5", [1234.5]),
        ("1.234.567", [1234567]),
        ("1.234", [1.234]),
        ("1,23,456", [123456]),
        ("1'234 and 1\u202f234_567", [1234567]),
        ("0,125", [0.125]),
        ("1,2,3", [1, 2, 3]),
        ("1, 2", [2]),
        ("1 3/4 cups", [1.75]),
        ("1½", [1.5]),
        ("1/0", [1, 0]),
        ("3/4/2024", [3, 4, 2024]),
        ("F-16", [16]),
        ("= -$5", [-5]),
        ("−5", [-5]),
        ("-1/2", [-0.5]),
        ("10%-20%", [10, 20]),
        ("2.5e-3", [0.0025]),
        ("2^10", [2, 10]),
        (".5", [0.5]),
        ("5.", [5]),
        ("v3.4.5", [3, 4, 5]),
        ("9" * 5000 + " 7", [7]),
        ("-", None),
    ],
)
def test_numbers_are_read_as_documented(text, expected) -> None:
    found = last_number(text)
    assert (found if found is None else [float(part) for part in found]) == expected


def test_words_of_english_are_those_of_rouge_score() -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    text = "It's 20% (not 19.5%) of Ada_Lovelace's happily running machines -- quickly, re-done\tTODAY!"
    assert words(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize("judge", ["exact", "contains", "rouge_l", "number"])
def test_the_best_of_several_right_answers_counts(judge) -> None:
    prompt = Prompt("p", "t", "q", "one 1", judge, alternatives=("two 2", "drei 3"))
    assert [prompt.score(answer, "") for answer in ("Two 2.", "drei 3", "four 4")] == [1, 1, 0]


@pytest.mark.parametrize(
    "whole",
    ["Paris", "PARIS.", "paris!?", "Paris, France", "London", "Par is", "Paris. .", "", "...", "+", "cafe\u0301"],
)
@pytest.mark.parametrize("references", [["Paris"], ["paris."], ["Par"], ["..."], ["+"], ["CAFÉ"], ["Par", "London"]])
def test_what_can_no_longer_become_exact_never_does(whole, references) -> None:
    begun = [may_become_exact(whole[:end].strip(), references) for end in range(len(whole) + 1)]
    assert begun[0], "nothing is said yet"
    assert begun == sorted(begun, reverse=True), "what has diverged stays so"
    assert begun[-1] or not score("exact", whole, references, ""), "a right answer has never diverged"
    assert not may_become_exact("Lyo", references)


OWN = """
def half(answer, reference, full): return 0.5
def true(answer, reference, full): return True
def wild(answer, reference, full): return 2.0
def none(answer, reference, full): return None
def text(answer, reference, full): return "0.5"
def nan(answer, reference, full): return float("nan")
def below(answer, reference, full): return -0.1
def raises(answer, reference, full): raise OSError("no disk")
def free(answer, reference, full): return float(answer == full)
free.needs_reference = False
"""


def test_a_judge_of_the_users_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_judges.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name, value in {"half": 0.5, "true": 1, "free": 1}.items():
        assert Prompt("p7", "t", "q", "b", f"my_judges:{name}").score("a", "a") == value
    for name, value in {"wild": "2.0", "none": "None", "text": "'0.5'", "nan": "nan", "below": "-0.1"}.items():
        with pytest.raises(JudgeError) as caught:
            Prompt("p7", "t", "q", "b", f"my_judges:{name}").score("a", "c")
        assert str(caught.value) == (
            f"the prompt 'p7': the judge 'my_judges:{name}' gave the score {value}; a score is a number in [0, 1]"
        )
    with pytest.raises(JudgeError, match="the judge 'my_judges:raises' failed on prompt 'p7': no disk"):
        Prompt("p7", "t", "q", "b", "my_judges:raises").score("a", "c")
    with pytest.raises(JudgeError, match="cannot import the judge 'my_judges:absent'"):
        check_judge("my_judges:absent")
    assert score("my_judges:free", "a", (), "a") == 1
    with pytest.raises(JudgeError, match="the reference is missing, and the judge 'my_judges:half' needs one"):
        score("my_judges:half", "a", (), "a")
