"""A run with a menu of early exits: heads are fitted, and one pass labels all exits."""

import json

import pytest
import torch
from tiny_run import change_prompts

from backbone.errors import PlanError
from backbone.execution.apply_plan import apply_plan, apply_plans
from backbone.families import model_fingerprint, sublayer_bytes
from backbone.healing.healing import Bridge, Healing
from backbone.healing.training_targets import Example
from backbone.loading import load_backbone
from backbone.plan import LayerPlan, PlanMenu
from pipelines.config import ConfigError, load_config
from pipelines.evaluation.summary import closing
from pipelines.run.runner import run_all
from pipelines.run.state import stage_key
from pipelines.run.workspace import Workspace
from pipelines.stages import exit_heads
from pipelines.stages import menu as menus
from pipelines.stages.adapt import _HealingMaker
from pipelines.stages.exit_heads import best_exits, make_heads
from runtime.allocator import Allocator

MENU = {"method": "exits", "probe_depth": 2}


@pytest.mark.parametrize(("judge", "chosen"), [("agreement", {"own"}), ("exact", {"own", "references"})])
def test_a_run_fits_heads_and_labels_exits_in_one_pass(config_file, prompts_file, judge, chosen) -> None:
    if judge == "exact":
        change_prompts(prompts_file, lambda number, row: row | {"judge": judge, "reference": row["prompt"][-1]})
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
    assert {task for fit in fits.values() for task in fit["by_task"]} == {"short", "long"}


def test_of_a_menu_of_heads_the_best_exits_stay(config_file, prompts_file) -> None:
    """The plans that the stage `adapt` keeps are those of every later stage."""
    change_prompts(prompts_file, lambda number, row: row | {"judge": "exact", "reference": row["prompt"][-1]})
    menu = {"method": "heads", "probe_depth": 2, "cheapest_budget": 0.34, "plans": 3}
    config = load_config(config_file(menu=menu, adapt={"method": "heads"}, evaluation={"speed_rounds": 1}))
    run_all(config)
    workspace, adapt = Workspace(config), json.loads((config.folder / "adapt.json").read_text())
    frozen = workspace.frozen_menu()
    assert list(adapt["heads"]["screened"]) == ["0-1", "0-2", "0-3", "0-4", "0-5h"] == list(map(str, frozen.plans[:-1]))
    *kept, full = workspace.menu().plans
    assert full == frozen.plans[-1]
    assert str(kept[-1]) == "0-5h"
    assert 2 <= len(kept) <= 3  # two of a menu of three are chosen, and the full depth stays in any case
    assert set(workspace.healing.bridges) == set(kept)
    assert {*adapt["added_budget"]} == {*map(str, kept)} == {*adapt["heads"]["fits"][adapt["heads"]["targets"]]}
    assert Allocator.from_pretrained(config.folder / "allocator").menu == workspace.menu()


@pytest.mark.parametrize(
    ("said", "count", "expected"),
    [
        (["1100", "1100", "1111", "1111"], 3, ["0", "0-2", "0-5h"]),
        (["1100", "0011", "1100", "1100"], 3, ["0", "0-1", "0-5h"]),
        (["1000", "0000", "1111", "1111"], 2, ["0-2", "0-5h"]),
        (["1111", "1111", "1111", "1111"], 2, ["0", "0-5h"]),
        (["1000", "1100", "1110", "1111"], 9, ["0", "0-1", "0-2", "0-5h"]),
    ],
    ids=["one adds nothing", "they complete each other", "a single one", "all say all", "more than there are"],
)
def test_the_best_exits_are_those_that_an_oracle_spends_least_with(said, count, expected) -> None:
    plans = [LayerPlan.parse(text, 6) for text in ("0", "0-1", "0-2", "0-5h")]
    of = [{text: digit == "1" for text, digit in enumerate(each)} for each in said]
    found = best_exits(dict(zip(plans, of, strict=True)), [plan.layers / 6 for plan in plans], count)
    assert [str(plan) for plan in found] == expected


@pytest.mark.parametrize(
    ("section", "changed"),
    [("menu", {"plans": 4}), ("menu", {"method": "exits"}), ("decoding", {"max_new_tokens": 5})],
)
def test_heads_are_made_anew_for_another_menu_and_other_answers(config_file, prompts_file, section, changed) -> None:
    """The stage `menu` leaves the same file whatever these are."""
    config = load_config(config_file(menu={"method": "heads", "probe_depth": 2}, adapt={"method": "heads"}))
    other = config.model_copy(update={section: getattr(config, section).model_copy(update=changed)})
    assert stage_key(Workspace(other), "adapt") != stage_key(Workspace(config), "adapt")


def menu_of(model, *plans: LayerPlan) -> PlanMenu:
    return PlanMenu.build(plans, sublayer_bytes(model), probe_depth=1)


def test_heads_of_other_plans_are_refused(model) -> None:
    with pytest.raises(ConfigError, match="the menu has the plan 0-2,4-5; take 'bridges'"):
        make_heads(model, [Example((3, 4, 5), 1)], ["t"], menu_of(model, LayerPlan.skipping(6, {3})), "auto")


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
    workspace = Workspace(load_config(path))
    menus.run(workspace)
    assert _HealingMaker(workspace, None).methods == expected


def test_targets_are_compared_at_a_few_depths(model) -> None:
    draws = torch.randint(3, 20, (160, 6), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [Example((*row, row[-1]), 1, from_reference=True) for row in draws]
    plans = [LayerPlan.exiting(6, depth) for depth in range(1, 6)]
    heads, record = make_heads(model, examples, ["t"] * 160, menu_of(model, *plans), "auto")
    assert set(heads) == set(plans)
    kept, other = record["targets"], {"own", "references"} - {record["targets"]}
    assert list(record["fits"][kept]) == [str(plan) for plan in plans]
    assert [len(record["fits"][name]) for name in other] == [3]


def test_too_many_states_are_read_from_fewer_prompts(model, monkeypatch) -> None:
    examples = [Example((3, 4, 5, 6), 1)] * 64
    size = exit_heads.places_bytes(model, examples, [3])
    assert size == 64 * 3 * 2 * 32 * 4
    monkeypatch.setattr(exit_heads, "STATES_BYTES", size // 2)
    _, record = make_heads(model, examples, ["t"] * 64, menu_of(model, LayerPlan.exiting(6, 3)), "own")
    assert record["prompts"] == 32


def heads_that_say(model, token: int, plans: list[LayerPlan]) -> Healing:
    """Heads after which every state is one that says the same token."""
    size = model.config.get_text_config().hidden_size
    state = model.get_output_embeddings().weight[token].float().detach()
    head = Bridge((-torch.eye(size),), state / state.norm() * size)
    return Healing(model_fingerprint(model), {plan: {len(plan.attention): head} for plan in plans})


def test_a_menu_with_a_head_at_full_depth_runs_at_several_levels(
    config_file, prompts_file, model_folder, tmp_path
) -> None:
    """Every head says the reference, which the model says for one prompt of six."""
    change_prompts(prompts_file, lambda number, row: row | {"judge": "exact", "reference": "?"})
    model, tokenizer = load_backbone(str(model_folder))
    given = ["0-2", "0-3", "0-5h"]
    plans = [LayerPlan.parse(text, 6) for text in given]
    heads_that_say(model, tokenizer.convert_tokens_to_ids("?"), plans).save(tmp_path / "heads.safetensors")
    path = config_file(
        menu={"method": "given", "probe_depth": 2, "given": given},
        adapt={"method": "given", "given": str(tmp_path / "heads.safetensors")},
        decoding={"max_new_tokens": 1},
        calibration={"keep": [0.7, 1.0, 1.3], "delta": 0.4},
        evaluation={"speed_rounds": 1, "speed_prompts": 2, "speed_tokens": 2},
    )
    config = load_config(path)
    run_all(config)
    metrics = json.loads((config.folder / "metrics.json").read_text())
    check_table(metrics)
    allocator = Allocator.from_pretrained(config.folder / "allocator")
    assert [str(plan) for plan in allocator.menu.plans] == [*given, "0-5"]
    assert allocator.menu.budgets[2:] == (1.0, 1.0)
    check_levels(config.folder / "allocator", metrics)
    check_rows(Workspace(config), allocator)


def test_a_head_at_full_depth_is_fitted_like_others(model) -> None:
    healed, early = LayerPlan.parse("0-5h", 6), LayerPlan.exiting(6, 3)
    tokens = torch.randint(3, 20, (40, 5), generator=torch.Generator().manual_seed(0)).tolist()
    examples, menu = [Example((*row, row[-1]), 1) for row in tokens], menu_of(model, early, healed)
    fits, record = make_heads(model, examples, ["t"] * 40, menu, "own")
    assert set(fits) == {early, healed}
    assert set(record["fits"]["own"]) == {"0-2", "0-5h"}
    assert fits[healed].loss[0] < 1e-3 < fits[early].loss[0], "of its own distribution the model needs no head"


def check_table(metrics) -> None:
    names = [row["name"] for row in metrics["contributions"]]
    assert names[:3] == ["the model as it is", "the same with a fitted head", "the best single plan"]
    assert names[-1] == "the allocator"
    stock, healed, *_ = metrics["contributions"]
    assert stock["layers"] == healed["layers"] == 6
    assert stock["quality"] < 0.5 < healed["quality"] == 1.0
    assert all(name in closing(metrics, "report.html") for name in names)


def check_levels(folder, metrics) -> None:
    """Every certified level can be chosen, from the file and for one call; another is refused."""
    certified = [found["keep"] for found in metrics["certificates"] if found["price"] is not None]
    assert 1.3 in certified
    for keep in certified:
        chosen = Allocator.from_pretrained(folder, keep=keep)
        assert chosen.certificate.keep == keep
        assert chosen.keeps == certified
        assert chosen.drift is not None
    with pytest.raises(PlanError, match=r"keep=0.5 is not certified; certified are: .*1.3"):
        Allocator.from_pretrained(folder, keep=0.5)


def check_rows(workspace, allocator) -> None:
    """Mixed rows answer as alone, and as the labels say."""
    model, tokenizer = workspace.model.loaded
    prompts = workspace.prompts.labelled()[:4]
    labels = workspace.labels.read(prompts, allocator.menu)
    batch = allocator.inputs(tokenizer, [prompt.prompt for prompt in prompts])
    size = batch["input_ids"].shape[1]
    with apply_plans(model, allocator.menu.plans, workspace.healing):
        mixed = model.generate(**batch, max_new_tokens=1, do_sample=False)[:, size:].tolist()
    for place, plan in enumerate(allocator.menu.plans):
        with apply_plan(model, plan, allocator.healing):
            alone = model.generate(**batch, max_new_tokens=1, do_sample=False)[place, size:].tolist()
        assert mixed[place] == alone == list(labels[place][place].answer_ids)
    level = allocator.keeps[-1]
    chosen = allocator.at(level).allocate(model, **batch)
    output = allocator.generate(model, **batch, max_new_tokens=1, keep=level, return_dict_in_generate=True)
    assert output["plans"] == chosen
