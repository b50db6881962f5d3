import pytest

from backbone.errors import PlanError
from backbone.plan import LayerPlan, PlanMenu

BYTES = [(1, 3)] * 8


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (LayerPlan.full(18), "0-17"),
        (LayerPlan.skipping(18, {7, 8}), "0-6,9-17"),
        (LayerPlan.exiting(18, 12), "0-11"),
        (LayerPlan.skipping(18, {6, 7}, attention={9}, mlp={8}), "0-5,8a,9m,10-17"),
        (LayerPlan.skipping(3, {1}), "0,2"),
        (LayerPlan(18, range(18), range(18), healed=True), "0-17h"),
        (LayerPlan.skipping(4, mlp={1, 2}), "0,1-2a,3"),
    ],
)
def test_text_says_what_runs_and_reads_back(plan: LayerPlan, text: str) -> None:
    assert str(plan) == text
    assert LayerPlan.parse(text, plan.n_layers) == plan
    assert hash(LayerPlan.parse(text, plan.n_layers)) == hash(plan)


def test_layers_count_halves_for_sublayers() -> None:
    assert LayerPlan.skipping(10, {1}, attention={3}).layers == 8.5
    assert LayerPlan.skipping(10, {1}).skipped_layers == {1}


@pytest.mark.parametrize("n_run", range(4, 19))
def test_even_plans_run_the_probe_layers_the_last_and_the_number_asked_for(n_run: int) -> None:
    if n_run < 5:
        with pytest.raises(PlanError, match="at least 5 do"):
            LayerPlan.evenly(18, n_run, probe_depth=4)
        return
    plan = LayerPlan.evenly(18, n_run, probe_depth=4)
    assert plan.layers == n_run
    assert {0, 1, 2, 3, 17} <= plan.attention


def test_order_and_union() -> None:
    short, other = LayerPlan.skipping(8, {2, 3}), LayerPlan.skipping(8, {3, 4})
    assert short <= LayerPlan.full(8)
    assert not short <= other
    assert short | other == LayerPlan.skipping(8, {3})
    with pytest.raises(PlanError, match="8 and of 9 layers"):
        _ = short <= LayerPlan.full(9)


def test_budget_weighs_sublayers_by_their_bytes() -> None:
    assert LayerPlan.full(8).budget(BYTES) == 1
    assert LayerPlan.skipping(8, {1, 2}).budget(BYTES) == 0.75
    assert LayerPlan.skipping(8, attention={0, 1}).budget(BYTES) == 1 - 2 / 32


@pytest.mark.parametrize("text", ["", "a", "h", "3-", "1,,2", "0-7hh", "0-3h,4-7", "5b", "2-1x", "5-2", "9" * 5000])
def test_unreadable_text_is_quoted(text: str) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        LayerPlan.parse(text, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerPlan.skipping(8, {8}), "cannot skip layer 8: the model has layers 0 to 7"),
        (lambda: LayerPlan.skipping(8, attention={-1}), "cannot skip layer -1"),
        (lambda: LayerPlan.exiting(8, 9), "cannot run 9 layers of a model of 8"),
        (lambda: LayerPlan.skipping(8, range(8)), "must run at least one"),
        (lambda: LayerPlan.parse("0-9", 8), "layer 8 is outside the model"),
        (lambda: LayerPlan.parse("0-999999999", 8), "layer 8 is outside the model"),
        (lambda: LayerPlan.parse("0-5h", 8), "the mark h stands behind all layers, as in 0-7h"),
    ],
)
def test_impossible_plans_say_why(make, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def test_menu_is_sorted_ends_full_and_survives_a_file(tmp_path) -> None:
    plans = [LayerPlan.skipping(8, {5}), LayerPlan.exiting(8, 4), LayerPlan.skipping(8, {5})]
    menu = PlanMenu.build(plans, BYTES, probe_depth=3)
    assert [plan.layers for plan in menu.plans] == [4, 7, 8]
    assert menu.budgets == (0.5, 0.875, 1.0)
    menu = PlanMenu.build([*plans, LayerPlan.parse("0-7h", 8)], BYTES, probe_depth=3)
    assert [str(plan) for plan in menu.plans] == ["0-3", "0-4,6-7", "0-7h", "0-7"]
    assert menu.budgets[2:] == (1.0, 1.0)
    assert not menu.plans[2].is_full
    menu.save(tmp_path / "menu.json")
    assert PlanMenu.load(tmp_path / "menu.json") == menu


@pytest.mark.parametrize(
    ("plan", "probe_depth", "message"),
    [
        (LayerPlan.skipping(8, {2}), 3, "skips layer 2, but every plan runs the first 3 layers"),
        (LayerPlan.parse("0-7h", 8), 8, "probe_depth must be below 8"),
        (LayerPlan.full(9), 1, "is for 9 layers, the model has 8"),
    ],
)
def test_menu_refuses_plans_that_do_not_fit(plan, probe_depth, message) -> None:
    with pytest.raises(PlanError, match=message):
        PlanMenu.build([plan], BYTES, probe_depth)
