"""A run with a menu of early exits: heads are fitted, and one pass labels all exits."""

import json

import pytest
import torch

from backbone.plan import LayerPlan
from backbone.stand_ins.training_targets import Example
from pipelines import exit_heads
from pipelines.config import ConfigError, load_config
from pipelines.exit_heads import make_heads
from pipelines.runner import run_all
from pipelines.stages import menu as menus
from pipelines.stages.adapt import _Making
from pipelines.workspace import Workspace

MENU = {"method": "exits", "probe_depth": 2}


@pytest.mark.parametrize(("judge", "chosen"), [("agreement", {"own"}), ("exact", {"own", "references"})])
def test_a_run_fits_heads_and_labels_exits_in_one_pass(config_file, prompts_file, judge, chosen) -> None:
    tasks = {json.loads(line)["task"] for line in prompts_file.read_text().splitlines()}
    if judge == "exact":
        rows = [json.loads(line) | {"judge": judge} for line in prompts_file.read_text().splitlines()]
        texts = (json.dumps(row | {"reference": row["prompt"][-1]}) + "\n" for row in rows)
        prompts_file.write_text("".join(texts))
    config = load_config(config_file(menu=MENU, adapt={"method": "auto"}, evaluation={"speed_rounds": 1}))
    run_all(config)
    adapt, metrics = (json.loads((config.folder / name).read_text()) for name in ("adapt.json", "metrics.json"))
    assert adapt["heads"]["targets"] in chosen
    assert set(adapt["heads"]["fits"]) == chosen
    assert adapt["fitted_prompts"] == adapt["heads"]["prompts"] == metrics["prompts"]["adapt"]
    assert metrics["labelling"]["ratio_to_exhaustive"] < 0.6
    assert 0 < metrics["labelling"]["passes_a_prompt"] <= 1.2
    assert adapt["method"] == "heads"
    fits = adapt["heads"]["fits"][adapt["heads"]["targets"]]
    assert list(fits) == ["0-2", "0-3", "0-4"]
    assert {task for fit in fits.values() for task in fit["by_task"]} == tasks


def test_heads_of_other_plans_are_refused(model) -> None:
    with pytest.raises(ConfigError, match="the menu has the plan 0-2,4-5; take 'bridges'"):
        make_heads(model, [Example((3, 4, 5), 1)], ["t"], [LayerPlan.skipping(6, {3})], "auto")


@pytest.mark.parametrize(
    ("menu", "tokens", "expected"),
    [
        ({"method": "exits", "probe_depth": 2}, 8, ["heads"]),
        ({"method": "exits", "probe_depth": 2}, 30, ["bridges", "adapter"]),
        ({"method": "given", "given": ["0-2,5"], "probe_depth": 2}, 8, ["bridges", "adapter"]),
    ],
)
def test_auto_takes_heads_for_exits_with_short_answers(config_file, menu, tokens, expected) -> None:
    """The tiny model's answers have as many tokens as they may have."""
    path = config_file(menu=menu, adapt={"method": "auto"}, decoding={"max_new_tokens": tokens})
    workspace = Workspace.of(load_config(path))
    menus.run(workspace.config)
    assert _Making(workspace, None).methods == expected


def test_targets_are_compared_at_a_few_depths(model) -> None:
    draws = torch.randint(3, 20, (160, 6), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [Example((*row, row[-1]), 1, from_reference=True) for row in draws]
    plans = [LayerPlan.exiting(6, depth) for depth in range(1, 6)]
    heads, record = make_heads(model, examples, ["t"] * 160, plans, "auto")
    assert set(heads) == set(plans)
    kept, other = record["targets"], {"own", "references"} - {record["targets"]}
    assert list(record["fits"][kept]) == [str(plan) for plan in plans]
    assert [len(record["fits"][name]) for name in other] == [3]


def test_too_many_states_are_read_from_fewer_prompts(model, monkeypatch) -> None:
    examples = [Example((3, 4, 5, 6), 1)] * 64
    plans = [LayerPlan.exiting(6, 3)]
    size = exit_heads.places_bytes(model, examples, [3])
    assert size == 64 * 3 * 2 * 32 * 4
    monkeypatch.setattr(exit_heads, "STATES_BYTES", size // 2)
    _, record = make_heads(model, examples, ["t"] * 64, plans, "own")
    assert record["prompts"] == 32
