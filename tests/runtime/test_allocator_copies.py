"""An allocator as a Python object: its copies allocate as it does, and its repr is one line."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
from tiny import padded_batch
from tiny_allocator import PLANS, ByLength, make_allocator, with_healing

from backbone.healing.healing import Healing
from backbone.plan import LayerPlan
from controller.base import CONTROLLERS
from controller.certificate.drift import FEWEST, DriftAlarm

COPIES = {"copy.deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", ["mlp", "lightgbm", "logistic"])
def test_a_copy_allocates_the_same_plans(model, name, copied) -> None:
    batch = padded_batch()
    allocator = make_allocator(model, controller=CONTROLLERS[name](), name=name)
    allocator = replace(allocator, healing=Healing(allocator.fingerprint), drift=DriftAlarm(np.ones((50, 2))))
    plans = allocator.allocate(model, **batch)
    again = copied(allocator)
    assert again.allocate(model, **batch) == plans
    assert (again.menu, again.certificate) == (allocator.menu, allocator.certificate)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_healing(model, copied) -> None:
    allocator = with_healing(model)
    assert copied(allocator).prepare(model) is allocator.prepare(model)
    assert copied(allocator).healing.digest == allocator.healing.digest


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_alarm_has_seen_the_same_and_goes_on_by_itself(copied) -> None:
    alarm = DriftAlarm(np.abs(np.random.default_rng(0).normal(size=(50, 2))))
    alarm.observe(np.full((FEWEST, 3), 9.0), np.ones(FEWEST), [bytes([number]) for number in range(FEWEST)])
    assert alarm.triggered
    before, again = alarm.state, copied(alarm)
    assert again.state == before
    again.observe(np.full((1, 3), 9.0), np.ones(1), [bytes([3])])
    assert again.state.seen == before.seen, "a prompt that was counted before"
    again.reset()
    assert alarm.state == before


def test_one_line_says_what_an_allocator_is(model) -> None:
    allocator = make_allocator(model, controller=ByLength())
    assert repr(allocator) == (
        "Allocator('tiny', PlanMenu(3 plans of 4 to 6 layers), mlp, price 1, certified: insufficient, keep 0.9, "
        "confidence 0.9)"
    )
    assert "no certified price: all run the full model" in repr(make_allocator(model, price=None))


def test_plans_and_healing_print_in_one_line(model) -> None:
    assert repr(PLANS[0]) == "LayerPlan.parse('0-2,5', 6)"
    assert eval(repr(PLANS[0])) == LayerPlan.skipping(6, {3, 4})
    healing = with_healing(model).healing
    assert repr(healing) == f"Healing(for {healing.fingerprint}: bridges for 2 plans, 1 changed weights)"
