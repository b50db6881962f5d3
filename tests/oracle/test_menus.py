import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from backbone.errors import PlanError
from backbone.plan import LayerPlan
from oracle.decoding import Decoding
from oracle.menus import MENUS, build_menu, search_steps
from oracle.menus.base import MenuTask
from oracle.menus.methods import answered_batches, mean_divergences


def task_of(model, **changes) -> MenuTask:
    values = {
        "prompts": ["abc", "hgfedcba", "aa"],
        "decoding": Decoding(3),
        "probe_depth": 2,
        "n_plans": 4,
        "given": ["0-3"],
    }
    return MenuTask(model, tiny_tokenizer(), **{**values, "cheapest_budget": 0.5, **changes})


@pytest.mark.parametrize("method", sorted(set(MENUS) - {"covering"}))  # tests/oracle/test_covering.py
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_menus_keep_the_contract(method, family) -> None:
    task = task_of(tiny_model(family))
    menu = build_menu(method, task)
    assert 2 <= len(menu) <= (5 if method == "heads" else 4)  # `heads` tries every depth
    assert menu.plans[-1].is_full
    assert 0.33 <= menu.budgets[0] < 0.75
    assert all({0, 1} <= plan.attention & plan.mlp for plan in menu.plans)


def test_greedy_removes_first_what_the_answers_miss_least() -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # layer 3 adds nothing to the residual stream, so it must be the first to go
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    task = task_of(model, n_plans=7, cheapest_budget=0.01)
    menu = build_menu("greedy", task)
    assert menu.plans[-2] == LayerPlan.skipping(6, {3})
    assert all(small <= large for small, large in zip(menu.plans, menu.plans[1:], strict=False))
    plans = [LayerPlan.full(6), menu.plans[-2], menu.plans[0]]
    full, best, worst = map(mean_divergences(model, answered_batches(task), plans).__getitem__, plans)
    assert full == 0
    assert best == pytest.approx(0, abs=1e-5)
    assert worst > 0.01


def test_divergence_does_not_depend_on_the_company() -> None:
    task = task_of(tiny_model("gemma3_text"))
    batches = answered_batches(task)
    plans = [LayerPlan.skipping(6, {5}), LayerPlan.skipping(6, {2, 4}), LayerPlan.exiting(6, 2)]
    alone = {plan: mean_divergences(task.model, batches, [plan])[plan] for plan in plans}
    assert mean_divergences(task.model, batches, plans) == pytest.approx(alone, rel=1e-6)


def test_progress_counts_the_plans_tried() -> None:
    task, steps = task_of(tiny_model("llama"), cheapest_budget=0.01), []
    build_menu("greedy", task, lambda: steps.append(1))
    assert len(steps) == search_steps("greedy", task) == 4 + 3 + 2 + 1
    assert search_steps("evenly", task) == 0


@pytest.mark.parametrize("method", sorted(set(MENUS) - {"covering"}))
def test_menus_leave_out_a_layer_or_say_why_not(method) -> None:
    model = tiny_model("llama")
    for changes, most in (
        ({"probe_depth": 6}, "menu.probe_depth must be from 1 to"),
        ({"probe_depth": 5, "given": ["0-4"]}, "menu.probe_depth must be from 1 to 4 for this model, got 5"),
        ({"cheapest_budget": 0.95}, "menu.cheapest_budget must be at most 0.83 for this model of 6 layers, got 0.95"),
        ({"cheapest_budget": 0.01}, ""),
        ({"given": ["0-5"]}, "menu.given holds the full plan alone"),
    ):
        try:
            said = len(build_menu(method, task_of(model, **changes)))
        except PlanError as error:
            said = str(error)
        assert said in range(2, 7 if method == "heads" else 5) or (most and said.startswith(most)), (changes, said)
