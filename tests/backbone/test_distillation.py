"""Self-distillation of adapters and bridges: what it gains, resumes and refuses."""

import math
from dataclasses import replace
from itertools import count, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import N_LAYERS, check_shared_passes, padded_batch, tiny_model

from backbone.errors import InputError, UnsupportedModelError
from backbone.execution.apply_plan import apply_plan
from backbone.execution.shared_passes import sharing_order, unchanged_depth
from backbone.families import model_fingerprint
from backbone.healing import distillation, trained_parts, training_targets
from backbone.healing.distillation import History, distil
from backbone.healing.fit_bridges import bridges_of, fit_bridges
from backbone.healing.settings import DistillSettings
from backbone.healing.training_targets import Example
from backbone.plan import LayerPlan

PROBE = 2
PLANS = [LayerPlan.exiting(N_LAYERS, 3), LayerPlan.exiting(N_LAYERS, 4), LayerPlan.skipping(N_LAYERS, {3})]
FULL = LayerPlan.full(N_LAYERS)
SHORT = DistillSettings(epochs=4, batch_tokens=64, rank=4, evaluate_every=3, learning_rate=5e-3, patience=99)


def examples(model, count: int = 24) -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in (3 + i % 7 for i in range(count)):
        prompt = torch.randint(3, 97, (1, length), generator=generator)
        tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)[0].tolist()
        rows.append(Example(tuple(tokens), 4))
    return rows


def trained(model, folder, settings=SHORT, plans=PLANS, bridges=None, some=None, looked=lambda history: None):
    return distil(
        model, some or examples(model), plans, bridges or {}, PROBE, settings, folder, model_fingerprint(model), looked
    )


@pytest.mark.parametrize(
    ("family", "where"),
    [
        *((family, "all") for family in ("llama", "gpt2", "gemma3_text", "opt", "falcon", "mixtral")),
        *((family, "beside_gaps") for family in ("llama", "gpt2")),
    ],
)
def test_training_brings_every_plan_nearer_and_leaves_the_model_as_it_was(family, where, tmp_path) -> None:
    model, untouched, batch = tiny_model(family, layer_scale=0.7), tiny_model(family, layer_scale=0.7), padded_batch()
    settings = replace(SHORT, where=where, held=0.2)
    healing, history = trained(model, tmp_path, settings, some=examples(model, 96))
    assert history.ended == "all steps done"
    sums = [sum(losses.values()) for losses in history.held]
    assert min(sums) < sums[0]
    expected = dict(untouched.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert parameter.requires_grad
    with torch.no_grad():
        full = untouched(**batch).logits
        assert torch.equal(model(**batch).logits, full)
        with apply_plan(model, FULL, healing):
            assert torch.equal(model(**batch).logits, full)
        with apply_plan(model, PLANS[0], healing):
            adapted = model(**batch).logits
        with apply_plan(untouched, PLANS[0]):
            assert not torch.equal(untouched(**batch).logits, adapted)
        assert torch.equal(model(**batch).logits, full)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_model_in_half_precision_is_trained_in_it_with_parameters_in_float32(family, tmp_path, monkeypatch) -> None:
    model, dtypes = tiny_model(family, layer_scale=0.7).to(torch.bfloat16), set()
    kept = trained_parts.Trainable.healing

    def noted(trainable):
        dtypes.update(parameter.dtype for parameter in trainable.parameters.values())
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for half in (module.lora_A["default"], module.lora_B["default"]):
                    half.register_forward_hook(lambda _, given, made: products.update((given[0].dtype, made.dtype)))
        return kept(trainable)

    products: set[torch.dtype] = set()
    monkeypatch.setattr(trained_parts.Trainable, "healing", noted)
    healing, history = trained(model, tmp_path, some=examples(model, 96))
    assert (dtypes, products) == ({torch.float32}, {torch.bfloat16})
    sums = [sum(losses.values()) for losses in history.held]
    assert min(sums) < sums[0]
    assert healing.adapter is not None


@pytest.mark.parametrize("plans_per_step", [1, 2, 3])
def test_no_plan_is_left_out_however_few_run_at_a_step(tmp_path, monkeypatch, plans_per_step) -> None:
    model, plans, ran = tiny_model("llama"), [*PLANS, LayerPlan.exiting(N_LAYERS, 5)], []
    losses = distillation.DistillationLoss.losses

    def noted(self, batch, chosen, step):
        ran.extend([set(chosen)] if step >= 0 else [])
        return losses(self, batch, chosen, step)

    monkeypatch.setattr(distillation.DistillationLoss, "losses", noted)
    trained(model, tmp_path, replace(SHORT, plans_per_step=plans_per_step), plans)
    assert {len(chosen) for chosen in ran} == {plans_per_step}
    assert set.union(*ran) == set(plans)
    cheapest, largest = PLANS[0], {PLANS[2], plans[3]}
    assert plans_per_step == 1 or all(cheapest in chosen for chosen in ran)
    assert plans_per_step < 3 or all(chosen & largest for chosen in ran)


def test_the_held_loss_is_the_divergence_of_the_merged_model(tmp_path) -> None:
    """What training measured with PEFT's layers is what the merged weights do."""
    model = tiny_model("llama", layer_scale=0.7)
    some = examples(model)
    seen: list[History] = []
    healing, history = trained(model, tmp_path, some=some, looked=seen.append)
    best = min(history.held, key=lambda losses: sum(losses.values()))
    order = np.random.default_rng(SHORT.seed).permutation(len(some))
    held = [some[i] for i in order[: round(0.1 * len(some))]]
    for plan in PLANS:
        total = 0.0
        for example in held:
            ids = torch.tensor([example.tokens[:-1]])
            with torch.no_grad():
                full = model(ids).logits[0, -example.answer :].log_softmax(-1)
                with apply_plan(model, plan, healing):
                    own = model(ids).logits[0, -example.answer :].log_softmax(-1)
            total += float((full.exp() * (full - own)).sum())
        assert total / sum(example.answer for example in held) == pytest.approx(best[str(plan)], rel=0.05, abs=1e-3)


class Killed(BaseException):
    pass


def kill(history: History) -> None:
    if history.steps[-1] == 6:
        raise Killed


def test_a_killed_run_goes_on_to_the_same_result(tmp_path) -> None:
    whole, _ = trained(tiny_model("llama"), tmp_path / "whole", bridges=_bridges())

    model = tiny_model("llama")
    with pytest.raises(Killed):
        trained(model, tmp_path / "killed", bridges=_bridges(), looked=kill)
    steps: list[int] = []
    resumed, history = trained(
        model, tmp_path / "killed", bridges=_bridges(), looked=lambda history: steps.append(history.steps[-1])
    )
    assert steps[0] > 6
    assert all(a < b for a, b in pairwise(history.steps))
    assert resumed.digest == whole.digest


def test_minutes_are_steps_that_a_killed_run_goes_on_with(tmp_path, monkeypatch) -> None:
    """A clock on which every step and every look takes as long as is said."""
    ticks = iter(())

    def clock(seconds: float) -> None:
        nonlocal ticks
        ticks = count(0, seconds)

    monkeypatch.setattr(distillation, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    settings = replace(SHORT, epochs=0.5, minutes=0.5, patience=99)

    clock(1.0)
    whole, history = trained(tiny_model("llama"), tmp_path / "whole", settings)
    # 30 s, less two looks and four steps tried; a step takes a second, and a third of a look
    assert history.planned == int((30 - 2 - 4) / (1 + 1 / 3)) == history.steps[-1] == 18
    assert history.ended == "all steps done"
    assert history.seconds == sorted(history.seconds)
    clock(1.0)
    with pytest.raises(Killed):
        trained(tiny_model("llama"), tmp_path / "killed", settings, looked=kill)
    clock(0.1)  # a faster machine: what was planned stays
    resumed, again = trained(tiny_model("llama"), tmp_path / "killed", settings)
    assert again.steps == history.steps
    assert again.seconds == sorted(again.seconds)
    assert resumed.digest == whole.digest


def _bridges():
    model = tiny_model("llama")
    return bridges_of(fit_bridges(model, [example.tokens for example in examples(model)], PLANS, rank=4))


def test_bridges_are_trained_with_the_adapter_or_alone(tmp_path) -> None:
    model, bridges = tiny_model("llama"), _bridges()
    both, _ = trained(model, tmp_path / "both", bridges=bridges)
    alone, _ = trained(model, tmp_path / "alone", replace(SHORT, where="nowhere"), bridges=bridges)
    assert both.adapter is not None
    assert alone.adapter is None
    for made in (both, alone):
        for plan, of_plan in made.bridges.items():
            for first, bridge in of_plan.items():
                assert not torch.allclose(bridge.bias.float(), bridges[plan][first].bias, atol=1e-4)


def test_references_pull_towards_themselves(tmp_path) -> None:
    model = tiny_model("llama", layer_scale=0.7)
    references = [Example((*some.tokens[:-4], 11, 12, 13, 14), 4, from_reference=True) for some in examples(model)]
    settings = replace(SHORT, learning_rate=1e-2, epochs=30)
    healing, history = trained(model, tmp_path, settings, some=references)
    first, last = history.held[0], history.held[-1]
    assert all(last[plan] < 0.7 * first[plan] for plan in first)
    with apply_plan(model, PLANS[1], healing), torch.no_grad():
        tokens = model.generate(torch.tensor([references[0].tokens[:-4]]), max_new_tokens=4, do_sample=False)
    assert tokens[0, -4:].tolist() == [11, 12, 13, 14]


def test_a_loss_that_is_not_finite_ends_training_with_the_best_state_kept(tmp_path, monkeypatch) -> None:
    model, real, calls = tiny_model("llama"), training_targets.DistillationLoss.losses, []

    def broken(self, batch, plans, step):
        calls.append(step)
        return {plan: loss * (math.nan if step == 5 else 1) for plan, loss in real(self, batch, plans, step).items()}

    monkeypatch.setattr(training_targets.DistillationLoss, "losses", broken)
    healing, history = trained(model, tmp_path)
    assert history.ended.startswith("stopped at step 5: the loss is nan")
    assert all(torch.isfinite(factor).all() for factors in healing.adapter.changes.values() for factor in factors)


def test_too_little_memory_makes_smaller_batches_with_the_same_result(tmp_path, monkeypatch) -> None:
    whole, _ = trained(tiny_model("llama"), tmp_path / "whole")
    real, refused = training_targets.DistillationLoss.losses, []

    def scarce(self, batch, plans, step):
        if step >= 0 and sum(len(example.tokens) for example in batch) > 40:
            refused.append(step)
            raise torch.OutOfMemoryError
        return real(self, batch, plans, step)

    monkeypatch.setattr(training_targets.DistillationLoss, "losses", scarce)
    parts, _ = trained(tiny_model("llama"), tmp_path / "parts")
    assert refused
    for name, factors in whole.adapter.changes.items():
        for a, b in zip(factors, parts.adapter.changes[name], strict=True):
            assert torch.allclose(a.float(), b.float(), atol=2e-2)


def test_training_stops_where_the_held_loss_no_longer_falls(tmp_path) -> None:
    _, history = trained(tiny_model("llama"), tmp_path, replace(SHORT, learning_rate=3.0, epochs=50, patience=2))
    assert "the held-out loss was lowest 2 evaluations ago" in history.ended


def test_the_adapter_leaves_the_probe_alone(tmp_path) -> None:
    healing, _ = trained(tiny_model("llama"), tmp_path)
    changed = {int(name.split(".")[2]) for name in healing.adapter.changes}
    assert changed == set(range(PROBE, N_LAYERS))


def test_shared_passes_with_an_adapter_equal_separate_ones(tmp_path) -> None:
    model = tiny_model("llama")
    healing, _ = trained(model, tmp_path, bridges=_bridges())
    ready = healing.ready(model)
    assert unchanged_depth(PLANS, ready) == PROBE
    check_shared_passes(model, sharing_order([*PLANS, FULL], ready), ready)


def test_a_quantised_base_cannot_be_trained_through(tmp_path) -> None:
    model = tiny_model("llama")
    some = examples(model)
    module = model.get_submodule("model.layers.3.mlp.down_proj")
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="a quantised model cannot be trained through"):
        trained(model, tmp_path, some=some)
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point() and p is not module.weight)


def test_a_first_evaluation_that_is_not_finite_keeps_the_untrained_parts(tmp_path, monkeypatch) -> None:
    model, bridges = tiny_model("llama"), _bridges()
    monkeypatch.setattr(distillation._Run, "_held_losses", lambda run: {str(plan): math.nan for plan in PLANS})
    healing, history = trained(model, tmp_path, replace(SHORT, where="nowhere"), bridges=bridges)
    assert history.ended == "stopped at step 0: the held-out loss is nan; the best parameters so far are kept"
    assert torch.equal(healing.bridges[PLANS[2]][3].bias, bridges[PLANS[2]][3].bias.to(torch.bfloat16))


def test_examples_that_are_all_held_out_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"^1 examples are too few to train on: 1 are held out"):
        trained(tiny_model("llama"), tmp_path, some=examples(tiny_model("llama"), 1))
