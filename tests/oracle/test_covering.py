"""Menus of the plans with which an oracle spends least."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command import layerbudget
from tiny import tiny_model, tiny_tokenizer

from backbone.errors import PlanError
from backbone.plan import LayerPlan, PlanMenu
from oracle.decoding import Decoding
from oracle.labels.labeller import Labeller
from oracle.labels.store import LabelStore
from oracle.menus import LOSSES, build_menu, p_median, search_steps
from oracle.menus.base import MenuTask, TaskLabels
from oracle.menus.covering import Measured, pool_plans
from oracle.menus.p_median import best_plans, oracle_budget, substituted
from oracle.prompts import Prompt

TEXTS = ("abc", "hgfedcba", "aa", "cab", "bead", "feed")


def covering_task(model, folder, **changes) -> MenuTask:
    tokenizer, decoding = tiny_tokenizer(), Decoding(3)
    prompts = [Prompt(str(number), "t", text, "", "kl") for number, text in enumerate(TEXTS)]

    def labeller(healing) -> Labeller:
        return Labeller(model, tokenizer, decoding, LabelStore(folder / "labels.db"), 4, healing)

    others = [Prompt(text, "t", text, "", "agreement") for text in ("gab", "decade", "fade", "beef")]
    labels = TaskLabels(labeller, tokenizer, prompts, others, LayerPlan.full(6))
    values = {"probe_depth": 2, "n_plans": 4, "cheapest_budget": 0.5, "labels": labels, **changes}
    return MenuTask(model, tokenizer, list(TEXTS), decoding, **values)


def drawn(seed: int, n: int = 24, p: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n, p] of 0 and 1, more often 1 under larger plans, and budgets [p]."""
    draw = np.random.default_rng(seed)
    budgets = np.append(np.sort(draw.uniform(0.4, 0.95, p - 1)), 1.0)
    return (draw.random((n, p)) < budgets * draw.uniform(0.5, 1, (n, 1))).astype(float), budgets


@pytest.mark.parametrize("seed", range(4))
def test_the_menu_is_the_best_of_all_choices(seed) -> None:
    scores, budgets = drawn(seed)
    found = best_plans(scores, budgets, 4, [0.0, 0.1])
    every = [[*plans, 8] for plans in combinations(range(8), 3)]
    least = min(oracle_budget(scores, budgets, plans, [0.0, 0.1]) for plans in every)
    assert oracle_budget(scores, budgets, found, [0.0, 0.1]) == pytest.approx(least, rel=1e-3)
    assert found[-1] == 8
    assert len(found) == 4


def test_the_menu_without_steps_is_the_substituted_one() -> None:
    scores, budgets = drawn(1)
    assert best_plans(scores, budgets, 4, [0.05], steps=0) == substituted(scores, budgets, 4, [0.05])


def graded(seed: int, n: int = 96, p: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """As many prompts and plans as a search has; a prompt is answered where a plan runs about what it needs."""
    draw = np.random.default_rng(seed)
    budgets = np.append(np.sort(draw.uniform(0.5, 0.97, p - 1)), 1.0)
    enough = 1 / (1 + np.exp((draw.uniform(0.3, 1.1, (n, 1)) - budgets) / 0.08))
    return (draw.random((n, p)) < enough).astype(float), budgets


@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_for_a_bound_betters_the_substituted_menu(seed) -> None:
    scores, budgets = graded(seed)
    before, after = (best_plans(scores, budgets, 8, LOSSES, steps=steps) for steps in (0, 300))
    assert oracle_budget(scores, budgets, after, LOSSES) < 0.997 * oracle_budget(scores, budgets, before, LOSSES)


@pytest.mark.parametrize(
    ("problem", "count"), [(graded(2), 1 + 40 + 1 + p_median.STARTS), (drawn(0, 96, 60), 2)], ids=["open", "proved"]
)
def test_the_search_for_a_bound_looks_at_one_choice_a_step(problem, count, monkeypatch) -> None:
    """It ends where a bound proves a choice the best, and without one after so many steps and exchanges."""
    looked, real = [], p_median.oracle_budget
    monkeypatch.setattr(p_median, "substituted", lambda *_, begun=(): [*range(7), 59])
    monkeypatch.setattr(p_median, "oracle_budget", lambda *given: looked.append(1) or real(*given))
    best_plans(*problem, 8, LOSSES, steps=40)
    assert len(looked) == count


def test_of_as_many_plans_as_there_are_all_are_taken() -> None:
    scores, budgets = drawn(2, p=3)
    assert best_plans(scores, budgets, 5, [0.0]) == [0, 1, 2]


def test_prompts_that_need_different_places_get_both() -> None:
    """Half of the prompts survive without one place, half without another: a nested menu holds only one of these."""
    scores = np.array([[1, 0, 0, 1]] * 4 + [[0, 1, 0, 1]] * 4, dtype=float)
    budgets = np.array([0.6, 0.6, 0.8, 1.0])
    assert best_plans(scores, budgets, 3, [0.0]) == [0, 1, 3]


def test_plans_that_are_right_by_luck_do_not_crowd_out_one_that_is_right(monkeypatch) -> None:
    """Thirty cheap plans, each right on every fifth prompt at random, and one that is right on nineteen of twenty."""
    draw = np.random.default_rng(0)
    lucky, good = draw.random((40, 30)) < 0.2, draw.random((40, 1)) < 0.95
    plans = [*(LayerPlan.skipping(80, {40 + i, 41 + i}) for i in range(31)), LayerPlan.full(80)]
    scores = np.concatenate([lucky, good, np.ones((40, 1))], axis=1).astype(float)
    measured = Measured(plans, np.array([0.5] * 30 + [0.95, 1.0]), scores)
    assert plans[30] in measured.best(5, [0.0, 0.05])
    monkeypatch.setattr("oracle.menus.covering.TRUST", 1.0)
    assert plans[30] not in measured.best(5, [0.0, 0.05])


def test_covering_finds_the_layers_that_do_nothing(tmp_path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in (3, 4):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    menu = build_menu("covering", covering_task(model, tmp_path, n_plans=2, cheapest_budget=0.6))
    assert menu.plans[0] == LayerPlan.skipping(6, {3, 4})


def test_a_search_that_was_stopped_finds_its_labels(tmp_path, monkeypatch) -> None:
    model = tiny_model("llama")
    task = covering_task(model, tmp_path)
    menu, steps = build_menu("covering", task), []
    monkeypatch.setattr(Labeller, "_keep", lambda *_: pytest.fail("a label was made again"))
    assert build_menu("covering", covering_task(model, tmp_path), lambda: steps.append(1)) == menu
    assert not steps


def test_the_pool_holds_exits_gaps_and_even_spreads(tmp_path) -> None:
    task = covering_task(tiny_model("llama"), tmp_path)
    plans, steps = pool_plans(task), []
    assert {LayerPlan.exiting(6, 4), LayerPlan.skipping(6, {2, 3}), LayerPlan.skipping(6, {4})} <= set(plans)
    assert all(len(plan.skipped_layers) <= 3 for plan in plans)
    build_menu("covering", task, lambda: steps.append(1))
    assert len(plans) <= len(steps) <= search_steps("covering", task)


def test_a_menu_for_larger_losses_is_cheaper(tmp_path) -> None:
    model = tiny_model("llama")
    budgets = {}
    for losses in ((0.0,), (0.9,)):
        task = covering_task(model, tmp_path, n_plans=2, cheapest_budget=0.4, losses=losses)
        budgets[losses] = build_menu("covering", task).budgets[0]
    assert budgets[0.9,] < budgets[0.0,]
    assert search_steps("covering", task) > search_steps("covering", replace(task, losses=(0.0,)))


def test_a_task_without_labels_is_refused() -> None:
    task = MenuTask(tiny_model("llama"), tiny_tokenizer(), ["abc"], Decoding(3), 2, 4, 0.5)
    with pytest.raises(PlanError, match="looks at scores"):
        build_menu("covering", task)


def test_a_run_searches_for_it(config_file) -> None:
    path = config_file(menu={"method": "covering", "probe_depth": 2, "plans": 4, "cheapest_budget": 0.4, "prompts": 6})
    done = layerbudget("menu", path)
    assert done.returncode == 0, done.stderr
    menu = PlanMenu.load(Path(yaml.safe_load(path.read_text())["runs"]) / "tiny" / "menu.json")
    assert len(menu) == 4
    assert menu.budgets[0] >= 0.4
