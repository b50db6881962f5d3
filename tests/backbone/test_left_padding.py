"""How much memory a step may plan with."""

import pytest
import torch

from backbone.left_padding import memory_budget


@pytest.mark.parametrize(("free", "planned"), [(80 * 2**30, 20 * 2**30), (2**30, 2**30)])
def test_a_gpu_plans_with_a_share_of_what_is_free(monkeypatch, free, planned) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    assert memory_budget(torch.device("cuda"), 2**30, 0.25) == planned


def test_other_devices_plan_with_the_least(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("there is no GPU to ask"))
    assert memory_budget(torch.device("cpu"), 2**30, 0.25) == 2**30
