"""What a run says of itself, from its metrics alone, and the page that says so."""

import json
import re
import xml.etree.ElementTree as ElementTree
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from controller.base import ChoiceRule
from controller.report.headroom import Estimate
from controller.report.report_card import price_curve
from oracle.frontier.frontier import oracle_hull, static_points, upper_hull
from pipelines.config import ConfigError
from pipelines.evaluation import figures, svg
from pipelines.evaluation.bands import frontier_bands, price_band, spot
from pipelines.evaluation.report_rows import contestant_rows
from pipelines.evaluation.summary import (
    closing,
    contributions,
    ends,
    headline,
    load_metrics,
    saved,
    sentence,
    tail,
    tiles,
)
from pipelines.stages import report
from pipelines.stages.report import CONTENTS, with_contents, with_labels

RATIO = {"value": 1.08, "low": 1.06, "high": 1.1, "rounds": 9, "exceeds_noise": True}
NOISE = {"value": 1.01, "low": 0.95, "high": 1.09, "rounds": 9, "exceeds_noise": False}
GAIN = {
    "budget_saved": {"value": 0.06, "low": 0.04, "high": 0.08},
    "score_gained": {"value": 0.05, "low": 0.03, "high": 0.07},
}
NO_GAIN = {
    "budget_saved": {"value": 0.0, "low": -0.01, "high": 0.01},
    "score_gained": {"value": 0.0, "low": -0.02, "high": 0.01},
}
METRICS = {
    "best": "mlp",
    "mlp": {
        "layers": 13.62,
        "budget": 0.764,
        "quality": 0.85,
        "quality_ratio": 0.9832,
        "worse": 0.044,
        "better": 0.039,
        "score_lost": 0.05,
        "score_won": 0.033,
    },
    "best_static": {"budget": 1.0, "quality": 0.87},
    "static_mixture": {"budget": 0.764, "quality": 0.82},
    "random": {"budget": 0.765, "quality": 0.81},
    "judges": {"exact": 148},
    "worst_task": {"task": "translate", "tasks": 12, "n": 9, "kept": {"value": 0.88, "low": 0.7, "high": 1.05}},
    "comparison": {
        "pooled": {
            "prompts": 758,
            "alpha": 0.03,
            "against": dict.fromkeys(("static_mixture", "shuffled", "task"), GAIN),
        },
        "knows_the_prompt": True,
    },
    "contributions": [
        {"name": "the model as it is", "layers": 18.0, "budget": 1.0, "quality": 0.8646, "quality_ratio": 1.0},
        {"name": "the allocator", "layers": 13.62, "budget": 0.764, "quality": 0.85, "quality_ratio": 0.9832},
    ],
    "left_out": {},
    "model": {"layers": 18},
    "prompts": {"test": 148},
    "intervals": {"kept": {"low": 0.961, "high": 1.004}},
    "certificate": {"risk": "mean_score", "keep": 0.97, "delta": 0.1, "price": 2.0},
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


def test_what_explains_the_score_stands_in_one_table() -> None:
    card = {"layers": 18.0, "budget": 1.0, "quality": 0.9, "quality_ratio": 1.5, "worse": 0.1}
    metrics = {"best": "mlp", "mlp": card, "full": card, "best_static": card, "task": card, "random": card}
    names = ["the model as it is", "the best single plan", "the task's name as router", "the allocator"]
    rows = contributions(metrics)
    assert [row.pop("name") for row in rows] == names
    assert all(row.keys() == {"layers", "budget", "quality", "quality_ratio"} for row in rows)
    headed = contributions({**metrics, "full_with_head": card})
    assert [row["name"] for row in headed[:2]] == ["the model as it is", "the same with a fitted head"]


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
        ({"risk": "mean_score", "price": None}, "97% could not be certified"),
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
    assert "2 unseen prompts" in text
    assert "capital: Italy -> Rome / France ->" in text
    worse = [line for line in text.splitlines() if line.endswith("worse")]
    assert len(worse) == 1
    assert all(words in worse[0] for words in ("Lyon", "12 layers", "180 ms"))
    assert "1 of these 2 answers score as high as the full model's." in text
    assert text.endswith("Report: runs/demo/report.html")


def test_a_long_prompt_shows_its_end() -> None:
    assert tail("one\ntwo " + "x" * 80, 10) == "..." + "x" * 10


LONG = "one two three " * 20


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("Italy -> Rome\nFrance ->", "Italy -> Rome France ->"),
        ("a\x00b\u202ec\td", "a b c d"),
        (LONG + "end", f"{LONG[:80]} … {(LONG + 'end')[-40:]}"),
        ("", ""),
    ],
)
def test_ends_of_a_prompt_stand_on_one_line(prompt, shown) -> None:
    assert ends(prompt) == shown


@pytest.mark.parametrize(
    ("value", "low", "high", "less"),
    [(2.0, 1.0, 4.0, (0.5, 0.0, 0.75)), (0.8, 0.5, 1.0, (-0.25, -1.0, 0.0)), (1.25, None, None, (0.2, None, None))],
)
def test_cost_saved_is_the_share_of_the_time(value, low, high, less) -> None:
    assert tuple(saved({"value": value, "low": low, "high": high}).values()) == pytest.approx(less)


def _screen(metrics: dict) -> str:
    """All that the first screen and the end of a run say."""
    said = [text for tile in tiles(metrics).values() for text in tile]
    return " ".join([headline(metrics), *said, *closing(metrics, "report.html").split()])


def _against(**found: dict) -> dict:
    pooled = {**METRICS["comparison"]["pooled"], "against": {**METRICS["comparison"]["pooled"]["against"], **found}}
    knows = all(pooled["against"][name]["score_gained"]["low"] > 0 for name in pooled["against"])
    return {"comparison": {"pooled": pooled, "knows_the_prompt": knows}}


ONE_TASK = {**METRICS["comparison"]["pooled"], "against": {"static_mixture": GAIN, "shuffled": GAIN}}
SAVINGS = ("24% less to compute in the layers, 98%",)
FULL = {
    **METRICS["mlp"],
    "layers": 18.0,
    "budget": 1.0,
    "quality": 0.87,
    "quality_ratio": 1.0,
    "worse": 0.0,
    "better": 0.0,
}
SLOWER = {"value": 0.8, "low": 0.79, "high": 0.81, "rounds": 9, "exceeds_noise": True}
CLEARLY_ABOVE = {"value": 1.3, "low": 1.25, "high": 1.35, "rounds": 9, "exceeds_noise": True}
TABLE: dict[str, tuple[dict, tuple[str, ...], tuple[str, ...]]] = {
    "all is well": (
        {},
        (
            *SAVINGS,
            "7% less of the machine's time",
            "4.4% of the answers score lower",
            "3.9% score higher",
            "'translate' keeps least, 88% (70 to 105%)",
        ),
        ("No gain", "noise"),
    ),
    "the task's name does as well": (_against(task=NO_GAIN), ("No gain shown over the name of the task",), SAVINGS),
    "shuffled features do as well": (_against(shuffled=NO_GAIN), ("No gain shown over another prompt's",), SAVINGS),
    "mixtures do as well": (_against(static_mixture=NO_GAIN), ("No gain shown over static plans drawn",), SAVINGS),
    "random plans do as well": (
        {"random": {"budget": 0.765, "quality": 0.85}},
        ("No gain shown over the same plans dealt at random",),
        SAVINGS,
    ),
    "one plan does as well": (
        {"best_static": {"budget": 0.75, "quality": 0.86}},
        ("No gain shown over the best static plan",),
        SAVINGS,
    ),
    "no comparison could be made": (
        {"comparison": {"pooled": None, "knows_the_prompt": False}},
        ("No gain shown over another prompt's features",),
        (*SAVINGS, "out of fold"),
    ),
    "no certificate": (
        {"certificate": {**METRICS["certificate"], "price": None}, "mlp": FULL},
        ("Nothing could be saved with certainty", "All layers run for every prompt"),
        (*SAVINGS, "less to compute"),
    ),
    "nothing shortened": (
        {"mlp": FULL},
        ("Every prompt still runs all layers", "nothing gets faster"),
        (*SAVINGS, "less to compute"),
    ),
    "agreement": (
        {"judges": {"agreement": 148}},
        ("the judge agreement: whether it is the full model's own answer",),
        ("the one expected", "reference", "exact"),
    ),
    "two judges and one of somebody's own": (
        {"judges": {"exact": 100, "mine:judge": 48}},
        ("exact (100 prompts): whether it equals the reference", "mine:judge (48 prompts): a judge of your own"),
        (),
    ),
    "slower alone, faster in a batch": (
        {"speed": {**METRICS["speed"], "intervals": {"single": SLOWER, "batch": RATIO}}},
        ("25% more of the machine's time for a request, one prompt at a time",),
        ("7% less of the machine's",),
    ),
    "the gain is in a batch alone": (
        {"speed": {**METRICS["speed"], "intervals": {"single": NOISE, "batch": RATIO}}},
        ("7% less of the machine's time for a request, in a batch of 8", "0.95 to 1.09 times"),
        ("not measurable",),
    ),
    "all timings are noise": (
        {"speed": {**METRICS["speed"], "intervals": {"single": NOISE, "batch": NOISE}}},
        ("not measurable On this machine it is 0.95 to 1.09 times as fast",),
        ("of the machine's time",),
    ),
    "one task": (
        {
            "worst_task": {**METRICS["worst_task"], "tasks": 1},
            "comparison": {"pooled": ONE_TASK, "knows_the_prompt": True},
        },
        SAVINGS,
        ("keeps least", "name of the task"),
    ),
    "faster than the limit": (
        {"speed": {**METRICS["speed"], "intervals": {"single": CLEARLY_ABOVE, "batch": NOISE}}},
        ("not measurable", "exceeds what the layers left out allow"),
        ("times as fast", "1.30"),
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_no_sentence_is_contradicted_by_the_metrics(case: str) -> None:
    changes, said, unsaid = TABLE[case]
    text = _screen(_with(**changes))
    assert not [words for words in said if words not in text], text
    assert not [words for words in unsaid if words in text], text


def test_metrics_of_an_earlier_version_are_refused_in_a_sentence(tmp_path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({name: METRICS[name] for name in METRICS if name != "examples"}))
    with pytest.raises(ConfigError, match=r"earlier version and lacks 'examples'.*layerbudget evaluate CONFIG"):
        load_metrics(SimpleNamespace(folder=tmp_path))


FOLDER = Path(report.__file__).parent
TEMPLATE = (FOLDER / "report.html.j2").read_text()


def test_every_cell_bears_the_heading_of_its_column() -> None:
    head, row = "<tr><th>kind</th><th class='n'>of <b>full</b></th></tr>", "<tr><td>a</td><td class='n'>1</td></tr>"
    labelled = with_labels(f"<p><td></p><table>{head}{row}</table>")
    assert '<td data-label="kind">a</td>' in labelled
    assert "<td data-label=\"of full\" class='n'>1</td>" in labelled
    assert labelled.startswith("<p><td></p>"), "what is in no table stays"


def test_contents_link_to_every_section() -> None:
    anchors = re.findall(r'<h2 id="([^"]+)">', TEMPLATE)
    assert len({*anchors}) == len(anchors) == TEMPLATE.count("<h2") >= 10
    assert TEMPLATE.count(CONTENTS) == 1
    page = with_contents(
        f'<nav>{CONTENTS}</nav><h2 id="a">One &amp; all</h2><h2 id="b">Two</h2><h2>&lt;h2 id="c"></h2>'
    )
    assert page.count('<li><a href="#a">One &amp; all</a></li>\n<li><a href="#b">Two</a></li>') == 1
    assert page.count("<li>") == 2


def test_headings_of_tables_say_what_they_head() -> None:
    assert TEMPLATE.count("<th ") == TEMPLATE.count('<th scope="col"') > 40


def test_no_heading_skips_a_level() -> None:
    levels = [int(level) for level in re.findall(r"<h([1-6])", TEMPLATE)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(level <= before + 1 for before, level in pairwise(levels))


SCORES = np.array([[0.0, 0.5, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
BUDGETS = np.array([0.4, 0.7, 1.0])
RULE = ChoiceRule(BUDGETS, "score_lost")
LOSSES = np.array([[0.9, 0.4, 0.0], [0.1, 0.8, 0.0], [0.8, 0.2, 0.0], [0.5, 0.5, 0.0], [0.1, 0.1, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("shares", "budget", "quality"),
    [
        ([[0, 0, 1]] * 5, (1.0, 1.0, 1.0), 0.7),
        ([[0.5, 0, 0.5]] * 5, (0.7, 0.7, 0.7), 0.55),
        ([[0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]], (0.52, 0.4, 0.64), 0.7),
    ],
)
def test_a_spot_has_the_intervals_of_redrawn_prompts(shares, budget, quality) -> None:
    found = spot(np.array(shares, float), SCORES, BUDGETS)
    assert (found.budget.value, found.budget.low, found.budget.high) == pytest.approx(budget)
    assert found.quality.value == pytest.approx(quality)
    assert found.quality.low < quality < found.quality.high
    assert found.kept.value == pytest.approx(quality / 0.7)


def test_a_spot_of_a_model_that_scores_nothing_keeps_no_share() -> None:
    found = spot(np.eye(3)[[0, 1, 2]], np.zeros((3, 3)), BUDGETS)
    assert (found.quality.low, found.quality.high) == (0, 0)
    assert found.kept == Estimate(None, None, None)


def test_bands_hold_their_curves() -> None:
    bands = {**frontier_bands(SCORES, BUDGETS), "prices": price_band(LOSSES, SCORES, RULE)}
    for name, band in bands.items():
        assert (band.low <= band.scores + 1e-12).all(), name
        assert (band.scores <= band.high + 1e-12).all(), name
        assert (band.low < band.high).any(), name
    curves = {"mixture": upper_hull(static_points(SCORES, BUDGETS)), "oracle": oracle_hull(SCORES, BUDGETS)}
    for name, points in curves.items():
        assert np.interp(bands[name].budgets, *np.array(points).T) == pytest.approx(bands[name].scores)
    prices = np.array(price_curve(LOSSES, SCORES, RULE)).T
    assert np.stack([bands["prices"].budgets, bands["prices"].scores]) == pytest.approx(prices)


def test_contestants_have_the_speeds_that_were_measured() -> None:
    spots = {
        name: spot(np.eye(3)[[place] * 5], SCORES, BUDGETS) for place, name in enumerate(("mlp", "best_static", "full"))
    }
    speed = {**METRICS["speed"], "plan_intervals": [1, 2, 3]}
    static = {"plan_shares": [0.0, 1.0, 0.0]}
    metrics = {"best": "mlp", "best_static": static, "speed": speed, "model": {"plans": ["0-1", "0-3", "0-5"]}}
    rows = {
        row["name"]: (row["single"], row["batch"], row["spot"].budget.value) for row in contestant_rows(metrics, spots)
    }
    assert rows == {
        "full model, stock generate()": (None, None, 1.0),
        "best static plan, 0-3": (None, 2, 0.7),
        "allocator": (RATIO, NOISE, 0.4),
        "the same layers deleted, without a decision": (RATIO, None, 0.4),
    }


HOSTILE = (
    "<script>alert(1)</script>",
    "</title></svg><img src=x onerror=alert(1)>",
    "\"'&amp;&lt;",
    "$x^2$ and $\\frac{$",
    '<g id="prompts-1">',
    "\\1\\g<0>{{ 7 * 7 }}",
)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("narrow", [False, True])
def test_prompts_under_the_pointer_stay_text(text, narrow) -> None:
    dots = [
        figures.Dot(text, layers, change, f"{text}{layers}{change}") for layers in (2, 5) for change in (-1, 0, 0.5)
    ]
    root = ElementTree.fromstring(figures.prompts_by_task(dots, 6, narrow=narrow))
    space = "{http://www.w3.org/2000/svg}"
    assert sorted(title.text for title in root.iter(f"{space}title")) == sorted(dot.text for dot in dots)
    assert {element.tag.removeprefix(space) for element in root.iter()} <= {
        *["svg", "g", "defs", "style", "path", "use", "text", "title", "clipPath", "rect"]
    }
    assert any((element.text or "").startswith(text[:10]) for element in root.iter(f"{space}text"))


def test_a_policy_says_its_figures_under_the_pointer() -> None:
    known, unknown = Estimate(0.7, 0.6, 0.8), Estimate(None, None, None)
    drawn = figures.speed_against_quality(
        [
            figures.Contestant("plan <2>", "plans", "#123456", known, Estimate(1.5, 1.4, 1.6)),
            figures.Contestant("plan <3>", "plans", "#123456", unknown, known),
        ],
        "speed",
        "In a batch",
    )
    assert (
        "<title>plan &lt;2&gt;\n1.50 (1.40 to 1.60) times stock\n70.0% (60.0% to 80.0%) of the score kept</title>"
        in drawn
    )
    assert "plan &lt;3&gt;" not in drawn, "nothing is drawn of what is not known"
    assert ">plans<" in drawn


def test_figures_share_one_style() -> None:
    drawn = [
        figures.layers_by_task({"a": (1.0, 2.0), "b": (2.0, 3.0)}, 4, "#123456"),
        figures.least_budgets([0.5, 0.7, 1.0]),
    ]
    for text in drawn:
        assert svg.MUTED in text, "ticks"
        assert "11px" in text, "texts"
        head = text[: text.index(">")]
        assert not re.search(r" (width|height)=", head), "scales with the page"
        assert 'role="img" aria-label="' in head
        assert "<metadata" not in text
        assert svg.MUTED not in svg.themed(text), "the page's own colours"
    ids = [name for text in drawn for name in re.findall(r' id="([^"]+)"', text)]
    assert len({*ids}) == len(ids), "figures of one page share no ids"
