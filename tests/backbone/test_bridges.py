import weakref
from copy import deepcopy

import pytest
import torch
from tiny import N_LAYERS, OPTIONS, check_shared_passes, padded_batch, tiny_model

from backbone.errors import ArtefactError, InputError, UnsupportedModelError, WrongModelError
from backbone.execution.apply_plan import apply_plan
from backbone.execution.shared_passes import sharing_order
from backbone.families import model_fingerprint
from backbone.healing import fit_bridges as fitting
from backbone.healing.fit_bridges import bridges_of, fit_bridges
from backbone.healing.healing import Bridge, Healing, healing_digest
from backbone.healing.ridge_regression import Moments, fit_bridge
from backbone.plan import LayerPlan

PLANS = [
    LayerPlan.exiting(N_LAYERS, 3),
    LayerPlan.exiting(N_LAYERS, 2),
    LayerPlan.skipping(N_LAYERS, {2}),
    LayerPlan.skipping(N_LAYERS, {2, 3}),
    LayerPlan.skipping(N_LAYERS, {1, 3, 4}),
]

BRIDGE = Bridge((torch.eye(32),), torch.zeros(32))


def sequences(count: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (4 + i % 9,), generator=generator).tolist() for i in range(count)]


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    sums = Moments(x.shape[1], x.device)
    sums.add(x, y)
    return sums


def affine(rank: int, tokens: int = 400, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(tokens, size, dtype=torch.float64)
    change = torch.randn(size, rank, dtype=torch.float64) @ torch.randn(rank, size, dtype=torch.float64)
    return x, x + x @ change + torch.randn(size, dtype=torch.float64)


def test_a_full_bridge_recovers_an_affine_map() -> None:
    x, y = affine(rank=12)
    fit = fit_bridge(moments(x[:300], y[:300]), moments(x[300:], y[300:]), "full", 4)
    assert torch.allclose(fit.bridge(x.float()).double(), y, atol=1e-3)
    assert fit.form == "full"
    assert fit.error < 1e-9 < 0.1 < fit.skipping_error


def test_a_low_rank_bridge_recovers_a_map_of_its_rank_and_not_a_richer_one() -> None:
    x, y = affine(rank=3)
    good = fit_bridge(moments(x[:300], y[:300]), moments(x[300:], y[300:]), "low_rank", 11)
    poor = fit_bridge(moments(x[:300], y[:300]), moments(x[300:], y[300:]), "low_rank", 1)
    assert (good.bridge.rank, poor.bridge.rank) == (11, 1)
    assert good.error < 0.05 * poor.error


def test_the_error_of_the_sums_is_the_error_of_the_map() -> None:
    x, y = affine(rank=12)
    y = y + 0.3 * torch.randn_like(y)
    y[[0, 300]] = 0  # a state that no error is relative to
    fit = fit_bridge(moments(x[:300], y[:300]), moments(x[300:], y[300:]), "full", 4)
    weights = y[301:].pow(2).mean(-1, keepdim=True)
    expected = ((fit.bridge(x[301:].float()) - y[301:]).pow(2) / weights).mean()
    assert fit.error == pytest.approx(float(expected), rel=1e-3)


def test_the_held_tokens_choose_the_ridge() -> None:
    torch.manual_seed(1)
    x = torch.randn(40, 12, dtype=torch.float64)
    noise = x + 3 * torch.randn(40, 12, dtype=torch.float64)
    fit = fit_bridge(moments(x[:30], noise[:30]), moments(x[30:], noise[30:]), "full", 4)
    exact_x, exact_y = affine(rank=12)
    exact = fit_bridge(moments(exact_x[:300], exact_y[:300]), moments(exact_x[300:], exact_y[300:]), "full", 4)
    assert fit.ridge > exact.ridge


def test_too_few_tokens_for_a_full_bridge_give_a_low_rank_and_say_so() -> None:
    x, y = affine(rank=12)
    fit = fit_bridge(moments(x[:20], y[:20]), moments(x[300:], y[300:]), "full", 64)
    assert fit.form == "low_rank"
    assert fit.bridge.rank == 10


def test_states_that_are_not_finite_are_refused() -> None:
    x, y = affine(rank=12)
    y[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match="hidden states are not finite"):
        fit_bridge(moments(x, y), moments(x, y), "full", 4)


def test_one_sequence_is_too_few_for_bridges() -> None:
    with pytest.raises(InputError, match=r"^1 sequences are too few to fit bridges on"):
        fit_bridges(tiny_model("llama"), sequences(1), PLANS)


@pytest.mark.parametrize("in_order", [False, True])
def test_bridged_plans_are_nearer_to_the_full_model(in_order) -> None:
    model, batch = tiny_model("llama", layer_scale=0.5), padded_batch()
    fits = fit_bridges(model, sequences(200), PLANS, in_order=in_order)
    assert {plan: sorted(of_plan) for plan, of_plan in fits.items()} == {
        plan: [gap.start for gap in plan.gaps] for plan in PLANS
    }
    healing = Healing(model_fingerprint(model), bridges_of(fits))
    with torch.no_grad():
        full = model(**batch).logits[:, -1]
        for plan in PLANS:
            with apply_plan(model, plan):
                frozen = model(**batch).logits[:, -1]
            with apply_plan(model, plan, healing):
                bridged = model(**batch).logits[:, -1]
            assert (bridged - full).norm() < (frozen - full).norm()


def test_in_order_fits_later_gaps_on_what_the_shortened_model_produces() -> None:
    model, plan = tiny_model("llama"), LayerPlan.skipping(N_LAYERS, {1, 4})
    once = fit_bridges(model, sequences(), [plan])[plan]
    ordered = fit_bridges(model, sequences(), [plan], in_order=True)[plan]
    assert torch.equal(once[1].bridge.factors[0], ordered[1].bridge.factors[0])
    assert not torch.allclose(once[4].bridge.factors[0], ordered[4].bridge.factors[0])


def test_too_little_memory_makes_smaller_batches_with_the_same_bridges(monkeypatch) -> None:
    model, refused = tiny_model("llama"), []
    whole = fit_bridges(model, sequences(), PLANS, rank=4)
    real = fitting.padded_inputs

    def scarce(model, rows):
        if len(rows) > 5:
            refused.append(len(rows))
            raise torch.OutOfMemoryError
        return real(model, rows)

    monkeypatch.setattr(fitting, "padded_inputs", scarce)
    parts = fit_bridges(model, sequences(), PLANS, rank=4)
    assert refused
    state = torch.randn(7, 32)
    for plan, of_plan in bridges_of(whole).items():
        for first, bridge in of_plan.items():
            assert torch.allclose(bridge(state), bridges_of(parts)[plan][first](state), atol=1e-3)


def bridged_model(family: str):
    model = tiny_model(family)
    return model, Healing(model_fingerprint(model), bridges_of(fit_bridges(model, sequences(), PLANS, rank=8)))


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_generation_over_bridges_equals_the_uncached_computation(family) -> None:
    (model, healing), batch = bridged_model(family), padded_batch()
    for plan in PLANS:
        with apply_plan(model, plan, healing), torch.no_grad():
            generated = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            for _ in range(3):
                positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if family != "bloom" else {}
                token = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits[:, -1].argmax(-1)
                ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        assert torch.equal(generated, ids)


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_shared_passes_over_bridges_equal_separate_ones(family) -> None:
    model, healing = bridged_model(family)
    order = sharing_order([*PLANS, LayerPlan.full(N_LAYERS)], healing.ready(model))
    check_shared_passes(model, order, healing.ready(model))


def test_the_order_of_shared_passes_does_not_depend_on_where_bridges_lie() -> None:
    """Which plan pays for a shared layer is written beside each label."""
    model, orders = tiny_model("llama"), []
    for plans in (PLANS, PLANS[::-1]):
        bridges = {plan: {gap.start: deepcopy(BRIDGE) for gap in plan.gaps} for plan in plans}  # one behind the other
        orders.append(sharing_order(plans, Healing(model_fingerprint(model), bridges).ready(model)))
    assert orders[0] == orders[1]


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_the_full_plan_and_the_model_itself_are_bit_equal_with_bridges(family) -> None:
    plain, (model, healing), batch = tiny_model(family), bridged_model(family), padded_batch()
    with torch.no_grad():
        expected = plain(**batch).logits
        with apply_plan(model, LayerPlan.full(N_LAYERS), healing):
            assert torch.equal(model(**batch).logits, expected)
        with apply_plan(model, PLANS[0], healing):
            healed = model(**batch).logits
        assert torch.equal(model(**batch).logits, expected)
        with apply_plan(model, PLANS[0]):
            bare = model(**batch).logits
        assert not torch.equal(healed, bare)
        with apply_plan(plain, PLANS[0]):
            assert torch.equal(plain(**batch).logits, bare)
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_healing_survive_saving(tmp_path) -> None:
    model = tiny_model("llama")
    for form in ("full", "low_rank"):
        made = Healing(model_fingerprint(model), bridges_of(fit_bridges(model, sequences(), PLANS, form=form, rank=4)))
        made.save(tmp_path / "healing.safetensors")
        loaded = Healing.load(tmp_path / "healing.safetensors")
        assert loaded.digest == made.digest
        assert loaded.fingerprint == made.fingerprint
        state = torch.randn(2, 3, 32)
        for plan, bridges in made.bridges.items():
            for first, bridge in bridges.items():
                assert torch.equal(loaded.bridges[plan][first](state), bridge(state))


def test_plans_with_a_gap_in_common_are_saved(tmp_path) -> None:
    """Their bridges over it are fitted once."""
    model = tiny_model("llama")
    plans = [LayerPlan.skipping(N_LAYERS, gap) for gap in ({2, 5}, {3, 5})]
    made = Healing(model_fingerprint(model), bridges_of(fit_bridges(model, sequences(), plans, rank=4)))
    made.save(tmp_path / "made")
    loaded = Healing.load(tmp_path / "made")
    assert loaded.digest == made.digest
    assert loaded.bridges.keys() == {*plans}


def test_healing_of_another_model_and_other_files_are_refused(tmp_path) -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with pytest.raises(WrongModelError, match=r"made for llama-6x32-.*, the model given is llama-6x32-"):
        Healing(model_fingerprint(model)).ready(other)
    with pytest.raises(ArtefactError, match="holds no healing parts"):
        Healing.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ArtefactError, match="holds no healing parts"):
        Healing.load(tmp_path / "text")


def test_the_digest_names_what_a_plan_runs_with() -> None:
    model, healing = bridged_model("llama")
    assert healing_digest(healing.ready(model), PLANS[0]) == healing.digest
    assert healing_digest(healing.ready(model), LayerPlan.full(N_LAYERS)) == ""
    assert healing_digest(Healing(healing.fingerprint).ready(model), PLANS[0]) == ""
    assert healing_digest(None, PLANS[0]) == ""


def test_healing_is_made_ready_once_for_a_model_and_leaves_no_trace_on_it(tmp_path) -> None:
    """Equal healing, such as that of a run and of its allocator, shares the copies; they go with the healing."""
    model, healing = bridged_model("llama")
    before, found = set(vars(model)), healing.ready(model)
    assert set(vars(model)) == before
    healing.save(tmp_path / "healing.safetensors")
    assert healing.ready(model) is found is Healing.load(tmp_path / "healing.safetensors").ready(model)
    gone = weakref.ref(found.bridges[PLANS[0]][3].bias)
    del healing, found
    assert gone() is None
    model, healing = bridged_model("llama")
    found = healing.ready(model)
    assert healing.ready(model.to(torch.bfloat16)) is not found


def test_bridges_cost_what_their_parameters_weigh() -> None:
    model, plan = tiny_model("llama"), LayerPlan.exiting(N_LAYERS, 3)
    bridge = Bridge((torch.zeros(32, 32),), torch.zeros(32))
    healing = Healing(model_fingerprint(model), {plan: {3: bridge}})
    parameters = sum(p.numel() for p in model.model.layers.parameters())
    assert healing.cost(model, plan) == pytest.approx((32 * 32 + 32) / parameters)
    assert healing.cost(model, LayerPlan.full(N_LAYERS)) == 0
