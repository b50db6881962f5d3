"""What a run ends with, from its metrics alone."""

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest

from pipelines.config import ConfigError
from pipelines.summary import closing, load_metrics, sentence, tail

RATIO = {"value": 1.08, "low": 1.06, "high": 1.1, "rounds": 9, "exceeds_noise": True}
NOISE = {"value": 1.01, "low": 0.95, "high": 1.09, "rounds": 9, "exceeds_noise": False}
METRICS = {
    "best": "mlp",
    "mlp": {"layers": 13.62, "budget": 0.764, "quality_ratio": 0.9832},
    "model": {"layers": 18},
    "prompts": {"test": 148},
    "intervals": {"kept": {"low": 0.961, "high": 1.004}},
    "certificate": {"risk": "mean_score", "alpha": 0.03, "delta": 0.1, "price": 2.0},
    "speed": {"intervals": {"single": RATIO, "batch": NOISE}, "limit": RATIO, "prompts": 8, "rounds": 9},
    "examples": [
        {
            "task": "capital",
            "prompt": "Italy -> Rome\nFrance ->",
            "reference": "Paris",
            "full_answer": "Paris",
            "answer": answer,
            "full_score": 1.0,
            "score": score,
            "layers": 12,
            "full_ms": 210.2,
            "ms": 180.4,
        }
        for answer, score in (("Paris", 1.0), ("Lyon", 0.0))
    ],
}


def _with(**changes: object) -> dict:
    return {**deepcopy(METRICS), **changes}


def test_the_sentence_says_layers_quality_certificate_and_speed() -> None:
    assert sentence(METRICS) == (
        "13.6 of 18 layers a prompt (76% of the decoder) keep 98.3% (96 to 100%) of the full model's mean score on 148 "
        "unseen prompts; certified with 90% confidence to keep at least 97%; on this machine it is 1.08 times (1.06 to "
        "1.10) as fast as stock generate() one prompt at a time, where the layers left out allow 1.08 times (1.06 to "
        "1.10) at most, and 0.95 to 1.09 times as fast in a batch of 8."
    )


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        ({"risk": "score_lost", "price": 2.0}, "to lose at most 3% of a full score on average"),
        ({"risk": "insufficient", "price": 2.0}, "at most 3% of the answers are worse"),
        ({"risk": "mean_score", "price": None}, "no saving could be certified"),
    ],
)
def test_each_risk_has_its_words(certificate, words) -> None:
    assert words in sentence(_with(certificate={**METRICS["certificate"], **certificate}))


def test_too_few_rounds_give_no_speed() -> None:
    few = {**RATIO, "low": None, "high": None, "rounds": 2, "exceeds_noise": False}
    speed = {**METRICS["speed"], "intervals": {"single": few, "batch": few}, "limit": few, "rounds": 2}
    assert "2 timed rounds are too few" in sentence(_with(speed=speed))


def test_the_end_shows_both_answers_and_which_is_worse() -> None:
    text = closing(METRICS, "runs/demo/report.html")
    assert "Two unseen prompts" in text
    assert "capital: Italy -> Rome / France ->" in text
    worse = [line for line in text.splitlines() if line.endswith("worse")]
    assert len(worse) == 1
    assert all(words in worse[0] for words in ("Lyon", "12 layers", "180 ms"))
    assert "1 of these 2 answers score as high as the full model's." in text
    assert text.endswith("Report: runs/demo/report.html")


def test_a_long_prompt_shows_its_end() -> None:
    assert tail("one\ntwo " + "x" * 80, 10) == "..." + "x" * 10


def test_metrics_of_an_earlier_version_are_refused_in_a_sentence(tmp_path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({name: METRICS[name] for name in METRICS if name != "examples"}))
    with pytest.raises(ConfigError, match=r"earlier version and lacks 'examples'.*layerbudget evaluate CONFIG"):
        load_metrics(SimpleNamespace(folder=tmp_path))
