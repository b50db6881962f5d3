import json

import numpy as np
import pytest
import torch
from tiny import OPTIONS, tiny_model

from runtime import step_costs
from runtime.step_costs import StepCosts, estimated_step_costs, keep_step_costs, known_step_costs, measure_step_costs

COSTS = StepCosts((1, 3, 5), (10.0, 12.0, 20.0), (4.0, 4.0, 6.0), (1, 2, 4), (10.0, 11.0, 14.0), measured=True)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch) -> None:
    monkeypatch.setattr(step_costs, "_known", {})


def test_times_lie_on_straight_lines_between_the_measured_ones() -> None:
    assert COSTS.ms(1.0, np.array([1, 2, 3, 4, 5, 7])).tolist() == [10, 11, 12, 16, 20, 28]
    assert COSTS.ms(0.5, np.array([1, 3, 5, 7])).tolist() == [7, 8, 13, 18]


def test_a_mixed_pass_pays_the_head_for_all_and_each_layer_for_its_own_rows() -> None:
    assert COSTS.mixed_ms(5, np.array([5, 5])) == 20
    assert COSTS.mixed_ms(5, np.array([5, 3, 1, 0])) == 6 + (14 + 8 + 6 + 0) / 4


def test_checks_of_one_row_have_times_of_their_own() -> None:
    assert COSTS.checking_ms(np.array([1, 2, 3, 4, 6])).tolist() == [10, 11, 12.5, 14, 17]


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_the_estimate_grows_with_budget_and_tokens(family) -> None:
    costs = estimated_step_costs(tiny_model(family))
    assert not costs.measured
    tokens = np.array([1, 8, 64, 512])
    assert (np.diff(costs.ms(1.0, tokens)) > 0).all()
    assert (costs.ms(0.5, tokens) < costs.ms(1.0, tokens)).all()
    assert (costs.ms(0.5, tokens) > 0.5 * costs.ms(1.0, tokens)).all()


def test_measuring_gives_a_time_for_every_size_and_leaves_the_model_alone() -> None:
    model = tiny_model("gpt2")
    before = model(torch.ones(1, 3, dtype=torch.long)).logits
    costs = measure_step_costs(model)
    assert costs.measured
    assert len(costs.tokens) == len(costs.full_ms) == len(costs.fixed_ms)
    assert len(costs.check_tokens) == len(costs.check_ms)
    for times in (costs.full_ms, costs.check_ms):
        assert list(times) == sorted(times)
    assert all(0 <= fixed <= full for fixed, full in zip(costs.fixed_ms, costs.full_ms, strict=True))
    assert torch.equal(model(torch.ones(1, 3, dtype=torch.long)).logits, before)


def test_measured_costs_are_found_again_by_the_same_model_in_another_process(own_cache, monkeypatch) -> None:
    model = tiny_model("llama")
    assert not known_step_costs(model).measured
    keep_step_costs(model, COSTS)
    assert known_step_costs(model) == COSTS
    monkeypatch.setattr(step_costs, "_known", {})
    assert known_step_costs(tiny_model("llama")) == COSTS
    assert known_step_costs(tiny_model("llama", seed=1)) == COSTS, "other weights of the same shape take as long"
    assert not known_step_costs(tiny_model("llama", intermediate_size=48)).measured
    assert not known_step_costs(tiny_model("llama").to(torch.bfloat16)).measured
    assert len(list((own_cache / "step_costs").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"tokens": [1]}), '{"tokens": 1, "full_ms": 1, "fixed_ms": 2}'])
def test_a_damaged_file_counts_as_not_measured(own_cache, monkeypatch, caplog, text) -> None:
    model = tiny_model("llama")
    keep_step_costs(model, COSTS)
    next((own_cache / "step_costs").iterdir()).write_text(text)
    monkeypatch.setattr(step_costs, "_known", {})
    assert not known_step_costs(model).measured
    assert "cannot be read" in caplog.text


def test_a_cache_folder_that_cannot_be_used_costs_no_request(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "file"))
    model = tiny_model("llama")
    assert not known_step_costs(model).measured
    keep_step_costs(model, COSTS)
    assert known_step_costs(model) == COSTS
    assert "cannot be kept" in caplog.text
