"""The drift alarm of an allocator while it serves."""

from dataclasses import replace

import numpy as np
import torch
from tiny import N_LAYERS, VOCABULARY, padded_batch, tiny_tokenizer
from tiny_allocator import GREEDY, ByLength, make_allocator

from backbone.plan import LayerPlan
from controller.certificate.drift import FEWEST, RECOVERY, DriftAlarm, drift_scores
from runtime import offline

FULL = LayerPlan.full(N_LAYERS)
DICT = {"return_dict_in_generate": True}


def with_alarm(model, seed=0):
    """An allocator whose alarm has prompts of random letters as its reference."""
    allocator = make_allocator(model, controller=ByLength())
    draw = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(50):
        ids = torch.randint(3, VOCABULARY, (4, 8), generator=draw)
        decision = allocator.selector().decide(model, ids, None, keep_cache=False)
        scores.append(drift_scores(decision.projected, np.array(allocator.menu.budgets)[decision.chosen]))
    return replace(allocator, drift=DriftAlarm(np.concatenate(scores)))


def odd_prompts(count: int) -> torch.Tensor:
    """Different prompts [N, 8] that are unlike the reference's: nearly all of one letter."""
    ids = torch.full((count, 8), 5)
    ids[:, 0] = torch.arange(count) % 90 + 3
    ids[:, 1] = torch.arange(count) // 90 + 3
    return ids


def test_while_the_alarm_is_active_every_prompt_runs_the_full_plan(model, caplog) -> None:
    allocator, odd, once = with_alarm(model), odd_prompts(240), {**GREEDY, "max_new_tokens": 1}
    for start in range(0, 240, 4):
        output = allocator.generate(model, input_ids=odd[start : start + 4], **DICT, **once)
        assert output.drift == allocator.drift.state
        if allocator.drift.triggered:
            break
        assert output.plans != [FULL] * 4
    assert output.drift.triggered
    assert output.plans == [FULL] * 4
    assert allocator.allocate(model, odd[:4]) == [FULL] * 4
    assert "allocator.drift.reset()" in caplog.text
    output = allocator.generate(model, **padded_batch(), **GREEDY, **DICT)
    assert output.plans == [FULL] * 4
    assert torch.equal(output.sequences, model.generate(**padded_batch(), **GREEDY))
    allocator.drift.reset()
    assert allocator.allocate(model, odd[:4]) != [FULL] * 4


def test_the_alarm_clears_when_prompts_are_as_before(model, caplog) -> None:
    allocator, once = with_alarm(model), {**GREEDY, "max_new_tokens": 1}
    allocator.drift.observe(np.full((FEWEST, 3), 9.0), np.ones(FEWEST))
    assert allocator.drift.triggered
    draw = torch.Generator().manual_seed(1)
    for _ in range(RECOVERY // 20 + 2):
        usual = torch.randint(3, VOCABULARY, (20, 8), generator=draw)
        allocator.generate(model, input_ids=usual, **once)
    assert not allocator.drift.triggered
    assert "the drift alarm has cleared" in caplog.text
    assert allocator.allocate(model, usual) != [FULL] * 20


def test_a_prompt_counts_once_and_only_when_it_is_served(model) -> None:
    allocator, batch = with_alarm(model), padded_batch()
    plans = allocator.allocate(model, **batch)
    assert allocator.drift.state.seen == 0
    for _ in range(100):
        output = allocator.generate(model, **batch, **DICT, **{**GREEDY, "max_new_tokens": 1})
        assert output.plans == plans
    assert output.drift.seen == 4
    assert not output.drift.triggered
    unpadded = {name: tensor[3:, 7:] for name, tensor in batch.items()}
    allocator.generate(model, **unpadded, **GREEDY)
    assert allocator.drift.state.seen == 4, "the same prompt without its padding"


def test_prompts_that_are_probed_by_length_arrive_together(model, monkeypatch) -> None:
    """Sorted prompts would look like drift; a set is one arrival, whatever the order in which its parts are probed."""
    allocator, seen = make_allocator(model, controller=ByLength()), []

    class Watch(DriftAlarm):
        def observe(self, features, budgets, keys):
            seen.append(len(features))
            return False

    watched = replace(allocator, drift=Watch(np.ones((5, 2))))
    prompts = ["abcdefgh"[: 1 + i % 8] for i in range(40)]
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(offline, "PROBE_TOKENS", 64)
    texts = watched.generate_many(model, tokenizer, prompts, batch_size=8, max_new_tokens=2)
    assert seen == [40]
    assert texts == allocator.generate_many(model, tokenizer, prompts, batch_size=8, max_new_tokens=2)
