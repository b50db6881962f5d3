"""The verdict on a run: each reason, from figures alone."""

from copy import deepcopy

import pytest

from pipelines.verdict import REASONS, FullRun, verdict


def ratio(value: float, low: float | None = None) -> dict:
    return {"value": value, "low": low or value - 0.05, "high": value + 0.05, "exceeds_noise": True, "rounds": 9}


def card(budget: float, quality: float, plan: int) -> dict:
    return {"budget": budget, "quality_ratio": quality, "plan_shares": [float(place == plan) for place in range(3)]}


CERTIFICATE = {
    "risk": "mean_score",
    "keep": 0.97,
    "delta": 0.1,
    "n": 400,
    "price": 0.5,
    "groups": None,
    "levels": [],
    "full_score": 0.8,
    "prompts_needed": None,
    "sentence": "With 90% confidence, so much is kept.",
}
METRICS = {
    "best": "mlp",
    "mlp": card(0.6, 0.99, 1),
    "best_static": card(0.8, 0.98, 1),
    "certificate": CERTIFICATE,
    "certificates": [CERTIFICATE],
    "healing": {"method": "none"},
    "prompts": {"adapt": 300, "train": 250, "tune": 50, "calibrate": 400, "test": 200},
    "model": {"plans": ["0-5", "0-8", "0-11"]},
    "intervals": {"kept": {"low": 0.95, "high": 1.02}},
    "overhead_ms": 12.0,
    "speed": {
        "prompts": 8,
        "prompt_tokens": 200.0,
        "new_tokens": 4,
        "rounds": 9,
        "intervals": {"single": ratio(1.5), "batch": ratio(1.6)},
        "limit": ratio(1.7),
        "plan_intervals": [ratio(2.0), ratio(1.3), ratio(1.0)],
    },
}
NONE = {"price": None}
SLOW = {
    "best_static": card(1.0, 1.0, 2),
    "speed": {"intervals": {"single": ratio(1.02), "batch": ratio(1.01)}},
}
FEW = {**ratio(1.5), "low": None, "high": None, "exceeds_noise": False}
CASES = {
    "worth_it": ({}, 1500, ("Worth it: 1.50 times (1.45 to 1.55)", "keeping 99.0% (95 to 102%)", "certify 97%")),
    "score_too_low": (
        {"certificate": {**NONE, "n": 110, "full_score": 0.1}},
        1200,
        ("the model scores too low", "Its mean score is 0.1", "chat template"),
    ),
    "score_too_low, 0": (
        {"certificate": {**NONE, "full_score": 0.0}},
        1200,
        ("scores 0 on all calibration prompts", "chat template"),
    ),
    "single_plan": (
        {"best_static": card(0.59, 0.99, 1)},
        1200,
        ("the plan 0-8 for all prompts does as well", "--plan 0-8` writes a checkpoint of it"),
    ),
    "single_plan, uncertified": (
        {"certificate": NONE, "healing": {"method": "heads"}},
        1200,
        ("the plan 0-8", "which no ordinary checkpoint holds"),
    ),
    "too_few_prompts": (
        {"certificate": {**NONE, "n": 40}, "best_static": card(1.0, 1.0, 2)},
        1200,
        ("there are too few prompts yet", "this run had 40", "too few as well"),
    ),
    "too_few_prompts, so far": (
        {"certificate": {**NONE, "prompts_needed": 700}, "best_static": card(1.0, 1.0, 2)},
        12000,
        ("some 700 calibration prompts", "A full run has 4000 of them, which would likely do"),
    ),
    "too_few_prompts, where plans win": (
        {"certificate": {**NONE, "n": 60, "full_score": 0.69, "prompts_needed": 120}, "best_static": card(1.0, 1.0, 2)},
        2600,  # 141 calibration prompts without wins
        ("some 120 calibration prompts", "A full run has 130 of them, which would likely do"),
    ),
    "too_few_prompts, of a trial with three levels": (
        {
            "certificate": {**NONE, "n": 86, "full_score": 0.6, "prompts_needed": 258, "levels": [0.9, 0.8, 0.97]},
            "best_static": card(1.0, 1.0, 2),
        },
        3000,
        ("some 175 calibration prompts", "A full run has 215 of them, which would likely do"),
    ),
    "plans_lose_too_much": (
        {"certificate": {**NONE, "prompts_needed": 0}, "best_static": card(1.0, 1.0, 2), "mlp": card(1.0, 1.0, 2)},
        1200,
        ("the shortened plans lose too much", "The bound of 97% is out of reach"),
    ),
    "plans_lose_too_much, certified": (
        {"mlp": card(0.97, 1.0, 2), **SLOW},
        1200,
        ("leaves out 3% of the decoder",),
    ),
    "layers_do_not_matter": (
        {**SLOW, "speed": {**SLOW["speed"], "limit": ratio(1.04)}},
        1200,
        ("leaves out 40% of the decoder, which makes prompts of 200 and answers of 4 tokens 1.04 times", "output head"),
    ),
    "no_measured_gain": (SLOW, 1200, ("no reliable gain was measured on this machine", "A decision takes 12 ms")),
    "no_measured_gain, rounds": (
        {"speed": {"intervals": dict.fromkeys(("single", "batch"), FEW)}},
        1200,
        ("the timed rounds are too few",),
    ),
    "no_measured_gain, rounds and layers": (
        {"speed": {"intervals": dict.fromkeys(("single", "batch"), FEW), "limit": {**FEW, "value": 1.02}}},
        1200,
        ("the timed rounds are too few",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_verdict_names_the_reason(name) -> None:
    changes, prompts, parts = CASES[name]
    metrics = deepcopy(METRICS)
    for key, values in changes.items():
        metrics[key] = {**metrics[key], **values} if key != "mlp" else values
    metrics["certificates"] = [metrics["certificate"]]
    found = verdict(metrics, FullRun(prompts, 1))
    assert found.reason == name.split(",")[0], found
    assert found.worth == (name == "worth_it")
    said = {"worth_it": "Worth it: ", "single_plan": "One plan is enough: "}.get(found.reason, "Not worth it: ")
    assert found.sentences[0].startswith(said)
    assert all(found.sentences)
    text = " ".join(found.sentences)
    assert [part for part in parts if part not in text] == [], text


def test_every_reason_has_a_case() -> None:
    assert {name.split(",")[0] for name in CASES} == {*REASONS, "worth_it"}


@pytest.mark.parametrize(
    ("needed", "prompts", "reason"),
    [(900, 12000, "worth_it"), (900, 1200, "too_few_prompts"), (None, 12000, "plans_lose_too_much")],
)
def test_a_lower_level_counts_where_the_wanted_one_is_in_reach(needed, prompts, reason) -> None:
    metrics = deepcopy(METRICS)
    wanted = {**CERTIFICATE, **NONE, "prompts_needed": needed}
    metrics["certificate"] = {**CERTIFICATE, "keep": 0.6}
    metrics["certificates"] = [metrics["certificate"], wanted]
    metrics["best_static"] = card(0.5, 0.7, 1)
    assert verdict(metrics, FullRun(prompts, 1)).reason == reason
    metrics |= {"mlp": card(0.97, 0.99, 2), "speed": {**metrics["speed"], **SLOW["speed"]}}
    assert verdict(metrics, FullRun(prompts, 1)).reason == (reason if needed is None else "too_few_prompts"), (
        "a careful price"
    )
