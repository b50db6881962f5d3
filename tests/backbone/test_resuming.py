import pytest
from tiny import N_LAYERS, OPTIONS, check_shared_passes, padded_batch, tiny_model

from backbone.execution.shared_passes import SharedPasses, common_depth, sharing_order
from backbone.plan import LayerPlan

MODEL = tiny_model("llama")
PLANS = [
    LayerPlan.full(N_LAYERS),
    LayerPlan.skipping(N_LAYERS, {5}),
    LayerPlan.skipping(N_LAYERS, {3}),
    LayerPlan.skipping(N_LAYERS, {3, 5}),
    LayerPlan.skipping(N_LAYERS, {4}, attention={1}),
    LayerPlan.skipping(N_LAYERS, {4}, attention={1}, mlp={2}),
    LayerPlan.exiting(N_LAYERS, 2),
]


def test_common_depth_is_where_two_plans_part() -> None:
    assert common_depth(PLANS[0], PLANS[0]) == N_LAYERS
    assert common_depth(PLANS[0], PLANS[2]) == 3
    assert common_depth(PLANS[4], PLANS[5]) == 2


@pytest.mark.parametrize("order", [PLANS, PLANS[::-1], sharing_order(PLANS)], ids=["given", "reversed", "sharing"])
@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_shared_passes_equal_separate_ones(family, order) -> None:
    check_shared_passes(tiny_model(family), order)


def test_shared_passes_run_what_is_new_only() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    order = sharing_order(PLANS)
    shared = SharedPasses(model, order)
    for _ in order:
        with shared.next_plan():
            model(**batch, use_cache=False)
    assert shared.layers_run < 0.7 * sum(plan.layers for plan in PLANS)
    nodes = {tuple((i in p.attention, i in p.mlp) for i in range(d + 1)) for p in PLANS for d in range(N_LAYERS)}
    assert shared.layers_run >= sum(sum(node[-1]) for node in nodes) / 2
