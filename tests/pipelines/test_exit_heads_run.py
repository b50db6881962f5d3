"""A run with a menu of early exits: heads are fitted, and one pass labels all exits."""

import json

import pytest

from backbone.plan import LayerPlan
from backbone.stand_ins.training_targets import Example
from pipelines.config import ConfigError, load_config
from pipelines.exit_heads import make_heads
from pipelines.runner import run_all

MENU = {"method": "exiting", "probe_depth": 2, "plans": 4, "cheapest_budget": 0.4}


@pytest.mark.parametrize(("judge", "chosen"), [("agreement", {"own"}), ("exact", {"own", "references"})])
def test_a_run_fits_heads_and_labels_exits_in_one_pass(config_file, prompts_file, judge, chosen) -> None:
    if judge == "exact":
        rows = [json.loads(line) | {"judge": judge} for line in prompts_file.read_text().splitlines()]
        texts = (json.dumps(row | {"reference": row["prompt"][-1]}) + "\n" for row in rows)
        prompts_file.write_text("".join(texts))
    config = load_config(config_file(menu=MENU, adapt={"method": "heads"}, evaluation={"speed_rounds": 1}))
    run_all(config)
    adapt, metrics = (json.loads((config.folder / name).read_text()) for name in ("adapt.json", "metrics.json"))
    assert adapt["heads"]["targets"] in chosen
    assert set(adapt["heads"]["fits"]) == chosen
    assert adapt["fitted_prompts"] == adapt["heads"]["prompts"] == metrics["prompts"]["adapt"]
    assert metrics["labelling"]["ratio_to_exhaustive"] < 0.6


def test_heads_of_other_plans_are_refused(model) -> None:
    with pytest.raises(ConfigError, match="the menu has the plan 0-2,4-5; take 'bridges'"):
        make_heads(model, [Example((3, 4, 5), 1)], [LayerPlan.skipping(6, {3})], "auto")
