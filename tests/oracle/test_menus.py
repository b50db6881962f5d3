import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from backbone.plan import LayerPlan, PlanError
from oracle.decoding import Decoding
from oracle.menus import MENUS, AnswerDivergence, MenuTask, build_menu, search_steps


def task_of(model, **changes) -> MenuTask:
    values = {
        "prompts": ["abc", "hgfedcba", "aa"],
        "decoding": Decoding(3),
        "probe_depth": 2,
        "n_plans": 4,
        "given": ["0-3"],
    }
    return MenuTask(model, tiny_tokenizer(), **{**values, "cheapest_budget": 0.5, **changes})


@pytest.mark.parametrize("method", sorted(MENUS))
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_menus_keep_the_contract(method, family) -> None:
    task = task_of(tiny_model(family))
    menu = build_menu(method, task)
    assert 2 <= len(menu) <= 4
    assert menu.plans[-1].is_full
    assert 0.33 <= menu.budgets[0] < 0.75
    assert all({0, 1} <= plan.attention & plan.mlp for plan in menu.plans)


def test_greedy_removes_first_what_the_answers_miss_least() -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # layer 3 adds nothing to the residual stream, so it must be the first to go
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    task = task_of(model, n_plans=7, cheapest_budget=0.01)
    menu = build_menu("greedy_layers", task)
    assert menu.plans[-2] == LayerPlan.skipping(6, {3})
    assert all(small <= large for small, large in zip(menu.plans, menu.plans[1:], strict=False))
    divergence = AnswerDivergence(task)
    assert divergence.of(LayerPlan.full(6)) == 0
    assert divergence.of(menu.plans[-2]) == pytest.approx(0, abs=1e-5)
    assert divergence.of(menu.plans[0]) > 0.01


def test_progress_counts_the_plans_tried() -> None:
    task, steps = task_of(tiny_model("llama"), cheapest_budget=0.01), []
    build_menu("greedy_layers", task, lambda: steps.append(1))
    assert len(steps) == search_steps("greedy_layers", task) == 4 + 3 + 2 + 1
    assert search_steps("evenly", task) == 0


def test_a_probe_as_deep_as_the_model_is_refused() -> None:
    with pytest.raises(PlanError, match="probe_depth must be from 1 to 5 for this model, got 6"):
        task_of(tiny_model("llama"), probe_depth=6)
