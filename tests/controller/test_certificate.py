import json
from dataclasses import replace

import pytest

from controller.certificate.certificate import Certificate
from controller.certificate.risks import CalibrationError

COUNTED = Certificate("insufficient", 0.98, 0.1, 250, 3.5, 0.004, "abc", "2026-01-01", 114)
LOST = replace(COUNTED, risk="score_lost", fewest_prompts=129)
KEPT = replace(COUNTED, risk="mean_score", keep=0.97, observed_risk=-0.01, full_score=0.612)
TASKS = {"sums": {"n": 150, "observed_risk": 0.01}, "code": {"n": 100, "observed_risk": 0.002}}


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        (
            COUNTED,
            "With 90% confidence, at most 2% of prompts get an answer that scores lower than the full model's, on",
        ),
        (COUNTED, "like the 250 calibration prompts (observed: 0.4%)."),
        (replace(COUNTED, tolerance=0.05), "scores over 0.05 lower than the full model's"),
        (replace(COUNTED, delta=0.005), "With 99.5% confidence"),
        (LOST, "answers lose on average at most 0.02 of a score that runs from 0 to 1 against the full model's"),
        (replace(LOST, per_task=TASKS), "answers, in each task, lose"),
        (replace(LOST, per_task=TASKS), "'sums', the worst task: 0.01)."),
        (KEPT, "With 90% confidence, answers keep at least 97% of the full model's mean score, on prompts like"),
        (KEPT, "(observed: 101% of 0.612)."),
        (
            replace(KEPT, per_task={"sums": {"n": 9, "observed_risk": -0.02}}),
            "answers, in each task, keep at least 97%",
        ),
        (
            replace(KEPT, price=None, n=80),
            "takes at least 114 calibration prompts where that is 0.612, and there are 80",
        ),
        (replace(KEPT, price=None, prompts_needed=900), "at the spread of what they lose it takes about 900"),
        (replace(LOST, price=None, fewest_prompts=None), "takes more calibration prompts than can be looked at"),
        (replace(KEPT, price=None, fewest_prompts=None, full_score=0.0001), "is 0.0001, too near 0 for showing"),
        (replace(COUNTED, price=None), "250 calibration prompts do not suffice"),
        (replace(COUNTED, price=None, prompts_needed=0), "chooses the full plan for all 250 calibration prompts"),
        (
            replace(COUNTED, left_out=3),
            "Left out: 3 of 253 prompts, since the judge failed on the full model's answer.",
        ),
        (replace(COUNTED, groups=50), "like the 250 calibration prompts of 50 groups, each of which counts once ("),
        (replace(COUNTED, price=None, groups=50), "takes at least 114 groups of calibration prompts, and there are 50"),
        (replace(COUNTED, price=None), "so all prompts run the full model"),
        (replace(COUNTED, price=None, n=80), "takes at least 114 calibration prompts, and there are 80"),
        (
            replace(LOST, price=None, per_task=TASKS),
            "takes at least 129 calibration prompts of each task ('code' has 100)",
        ),
    ],
)
def test_certificates_speak_plainly_and_survive_a_file(tmp_path, certificate, words) -> None:
    assert words in certificate.sentence
    certificate.save(tmp_path / "certificate.json")
    assert Certificate.load(tmp_path / "certificate.json") == certificate


def test_a_certificate_says_what_it_does_not_cover() -> None:
    assert any("Single tasks" in line for line in COUNTED.does_not_cover)
    in_tasks = Certificate("insufficient", 0.98, 0.1, 250, 3.5, 0.004, "abc", "2026-01-01", 114, per_task=TASKS)
    assert "Tasks other than code, sums." in in_tasks.does_not_cover
    for words in ("2026-01-01", "0 of 250 were left out", "near-duplicates, and groups", "the best of several more"):
        assert any(words in line for line in COUNTED.does_not_cover)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"price": float("nan")}, "it holds NaN"),
        ({"price": "3"}, "certificate.json is not a certificate"),
        ({"keep": 2}, "keep is 2"),
        ({"observed_risk": -0.1}, "observed_risk is -0.1"),
        ({"full_score": "high"}, "full_score is 'high'"),
        ({"prompts_needed": 0.5}, "prompts_needed is 0.5"),
        ({"risk": "regret"}, "risk is 'regret'"),
        ({"threshold": 0.7}, r"unknown: \['threshold'\]"),
    ],
)
def test_a_changed_or_older_file_is_refused_in_a_sentence(tmp_path, change, words) -> None:
    path = tmp_path / "certificate.json"
    COUNTED.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CalibrationError, match=words):
        Certificate.load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", '{"sentence": ""}'])
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path, content) -> None:
    (tmp_path / "certificate.json").write_text(content)
    with pytest.raises(CalibrationError, match="make it again"):
        Certificate.load(tmp_path / "certificate.json")
    with pytest.raises(CalibrationError, match="make it again"):
        Certificate.load(tmp_path / "missing.json")
