"""The benchmarks run, and the README says what they measured."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import end_to_end
import gate
import pytest
import readme
import table
import timing
from tiny_allocator import make_allocator

from backbone.loading import load_backbone
from backbone.plan import LayerPlan, PlanMenu
from controller.certificate.risks import RISKS
from pipelines.config import load_config
from pipelines.run.runner import run_all
from runtime.step_costs import StepCosts

ROOT = Path(__file__).parents[1]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs a script of `benchmarks/` as a command, and gives what it wrote."""

    def run(name: str, written: str, *options: object) -> dict:
        module = import_module(name)
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        words = [word for option in options for word in (option.split() if isinstance(option, str) else [str(option)])]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        module.main()
        return json.loads((tmp_path / f"{written}.json").read_text())

    return run


FIGURE = re.compile(r"\d%|\d times\b|\b\d+\.\d+ (?:of|layers)|(?<![\w.])\d*\.\d\d\b|\d ms\b")
"""What a measured figure looks like."""


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_pages_show_the_committed_results(page) -> None:
    text = (ROOT / page).read_text()
    assert readme.rendered(text) == text, "run `python benchmarks/readme.py`"
    assert len(readme.BLOCK.findall(text)) >= 2


def test_readme_has_no_figure_beside_those_of_results() -> None:
    outside = readme.BLOCK.sub("", (ROOT / "README.md").read_text())
    assert [line for line in outside.splitlines() if FIGURE.search(line)] == []
    told = ["keeps 98.6% of", "1.10 times as fast", "13.9 of 18 layers", "22 of 51 ms", "a loss of .25"]
    assert all(FIGURE.search(line) for line in told)


def test_a_static_plan_of_equal_quality_is_the_cheapest() -> None:
    assert table.cheapest([(0.5, 0.1), (0.7, 0.9), (0.9, 0.8), (1.0, 0.95)], 0.85) == 1
    assert table.cheapest([(0.5, 0.1), (1.0, 0.95)], 0.96) == 1  # nothing keeps so much: the full plan


GOOD = {
    "fitted_prompts": 1.0,
    "certified_budget": 0.35,
    "quality": 1.06,
    "headroom": 0.2,
    "speed_one_at_a_time": 1.9,
    "speed_in_a_batch": 2.1,
}


@pytest.mark.parametrize(
    ("change", "outside"),
    [
        ({}, []),
        ({"certified_budget": 1.0}, ["certified_budget"]),
        ({"quality": None}, ["quality"]),
        ({"fitted_prompts": 400 / 832}, ["fitted_prompts"]),  # as measured with the default of adapt.prompts
        ({"fitted_prompts": 197 / 281}, ["fitted_prompts"]),  # as measured with the helper that repeated prompts
        ({"headroom": float("nan")}, ["headroom"]),
    ],
)
def test_the_gate_is_red_outside_its_bands(change, outside) -> None:
    bands = json.loads((ROOT / "configs" / "demo.bands.json").read_text())
    assert set(bands) == set(GOOD)
    assert sorted(gate.outside({**GOOD, **change}, bands)) == sorted(outside)


def test_decode_compares_plan_stock_and_deleted_model(model_folder, measured, capsys) -> None:
    options = "--name tiny --batches 2 --rounds 2 --budgets 1 0.5"
    rows = measured("decode", "decode-tiny-cpu-eager", "--model", model_folder, options)["rows"]
    assert [row["layers"] for row in rows] == [6, 3]
    assert all(row["cache_bytes"] == row["cache_bytes_deleted"] > 0 for row in rows)
    assert rows[1]["cache_bytes"] * 2 == rows[0]["cache_bytes"]
    assert "x the time of the deleted model" in capsys.readouterr().out


def test_mixed_batches_are_compared_and_a_stopped_run_goes_on(
    model_folder, tmp_path, monkeypatch, measured, capsys
) -> None:
    """The comparison that runs on a GPU with a large shape, here on a tiny one."""
    (tmp_path / "demo.json").write_text((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    # Times of a tiny model are noise, which the law would take over; how they are measured is tested with the runtime.
    costs = StepCosts((1, 8), (2.0, 3.0), (0.5, 0.6), (1, 8), (2.0, 3.0), measured=True)
    monkeypatch.setattr("runtime.step_costs.measure_step_costs", lambda model: costs)
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    options = "--name tiny --dtype float32 --rounds 1 --new-tokens 3 --contexts 8 --caches dynamic static"
    finished = tmp_path / "run"
    (finished / "allocator").mkdir(parents=True)
    menu = PlanMenu.build([LayerPlan.exiting(6, 4)], ((1, 1),) * 6, probe_depth=2)
    menu.save(finished / "allocator" / "menu.json")
    (finished / "metrics.json").write_text(json.dumps({"best": "mlp", "mlp": {"plan_shares": [0.75, 0.25]}}))

    def run(more: str) -> list[dict]:
        places = ("--model", model_folder, "--run", finished)
        return measured("mixed", "mixed-tiny-cpu-float32", *places, options, more)["rows"]

    single = run("--minutes 9 --batches 1")
    assert [(row["cache"], row["case"]) for row in single] == [
        (cache, case) for cache in ("dynamic", "static") for case in ("stock", "alone")
    ]
    rows = run("--minutes 9 --batches 1 4")
    assert rows[: len(single)] == single, "what was measured is kept"
    mixtures = [row for row in rows if row["batch"] == 4 and row["case"] != "stock"]
    assert [row["case"] for row in mixtures] == ["exit_half", "last_layer", "gap", "demo", "run"] * 2
    assert all(row["layers"] == 4.5 for row in mixtures if row["case"] == "run"), "3 rows of 4 leave after 4 layers"
    for row in mixtures:
        assert row["cache_to_stock"] == pytest.approx(row["layers"] / 6, abs=1e-3)
        assert row["step_ms"] > 0
        assert 0 < row["law"] <= 1
    assert run("--minutes 0 --batches 1 4 8") == rows
    assert "not begun: the time is up" in capsys.readouterr().out


def test_frontier_writes_time_and_gap_of_every_problem(measured, capsys) -> None:
    rows = measured("frontier", "frontier", "--prompts 200 --plans 6 --rounds 1")["rows"]
    assert len(rows) == 2
    assert all(row["seconds"] >= 0 and row["gap"] < 1 / 200 for row in rows)
    assert "from the bound" in capsys.readouterr().out


def test_menus_are_compared_as_static_plans(model_folder, prompts_file, measured) -> None:
    options = "--name tiny --prompts 12 --search-prompts 4 --plans 3 --max-new-tokens 3 --cheapest-budget 0.7"
    data = ("--model", model_folder, "--data", prompts_file)
    result = measured("menus", "menus-tiny", *data, options, "--methods exits greedy")
    assert {row["method"] for row in result["plans"]} == {"exits", "greedy"}
    assert all(row["quality_ratio"] == 1 for row in result["plans"] if row["budget"] == 1)
    assert 0.6 < result["oracle"]["equal_mean_budget"] <= result["oracle"]["own_score_budget"] <= 1


def test_labelling_compares_its_ways(model_folder, prompts_file, monkeypatch, measured) -> None:
    labelling = import_module("labelling")
    monkeypatch.setattr(labelling, "KILLS", 1)
    monkeypatch.setattr(labelling, "LABELLED", 400)
    monkeypatch.setattr(labelling, "million", lambda folder: {})
    options = "--prompts 16 --plans 3 --max-new-tokens 3 --alone 2 --judges agreement --device cpu"
    data = ("--model", model_folder, "--data", prompts_file)
    result = measured("labelling", "labelling-embedded", *data, options)
    assert result["kills"]["hash_equal"]
    assert result["kills"]["labels"] == result["kills"]["expected"]
    for menu in ("exits", "greedy"):
        assert result[menu]["agreement"]["shortcut"]["equal_scores"] == 1
        assert result[menu]["agreement"]["shortcut"]["forward_tokens_to_exhaustive"] < 1


def test_healing_is_compared_on_the_same_prompts(model_folder, tmp_path, measured) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"task": "ab"[i % 2], "prompt": f"{i} abcdef", "reference": "", "judge": "agreement"} for i in range(40)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--name tiny --train 20 --test 10 --plans 3 --probe-depth 2 --max-new-tokens 3 --search-prompts 4"
    steps = "--decode-steps 4 --leave-out a --epochs 1 --menus exits --methods none bridges both --stop"
    places = ("--model", model_folder, "--data", prompts, "--work", tmp_path / "work")
    result = measured("adapt", "adapt-tiny", *places, options, steps)
    frozen, bridged, _ = result["rows"]
    assert frozen["quality"][-1] == bridged["quality"][-1] == 1
    assert all(after > before for before, after in zip(frozen["budgets"][:-1], bridged["budgets"][:-1], strict=True))
    assert result["other_tasks"][0]["with"][-1] == result["other_tasks"][0]["without"][-1] == 1
    assert set(result["decode"][0]["to_deleted"]) == {"none", "bridges", "both"}
    assert "work" not in result["settings"]


def test_controllers_are_measured_on_a_finished_run(config_file, tmp_path, monkeypatch, measured) -> None:
    run_all(load_config(config_file(tuning={"components": [6], "folds": 2})))
    run = tmp_path / "runs" / "tiny"
    options = "--name tiny --alphas 0.1 --splits 20 --new-tokens 3 --tuning-prompts 120 --tuning-trials 4 --workers 1"
    result = measured("controllers", "controllers-tiny", "--run", run, options)
    split = json.loads((run / "metrics.json").read_text())["prompts"]
    assert result["prompts"] == sum(split.values()) - split["adapt"]
    assert {row["policy"] for row in result["captured"]} >= {"lightgbm", "mlp", "shuffled"}
    assert {(row["risk"], row["controller"]) for row in result["certificate"]} == {
        (risk, name) for risk in RISKS for name in ("lightgbm", "mlp")
    }
    assert all(row["of_pool"]["low"] <= 0.2 for row in result["certificate"]), "delta is 0.2"
    assert all(row["violations"] <= 0.3 for row in result["simulated"])
    assert 0 < result["milliseconds"]["decision"] < result["milliseconds"]["generation"] * 100
    assert result["tuning"]["trials_each"] == 2
    kept = measured("keep", "tiny", "--run", run)
    assert "settings" in kept["tuning"]["controllers"]["mlp"]
    assert "examples" not in kept
    assert str(tmp_path) not in json.dumps(kept)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    redrawn = measured("redraws", "redraws-tiny", "--run", run, "--name tiny --draws 2 --calibrations 2")
    assert redrawn["draws"] == 2
    policies = redrawn["policies"]
    assert policies.keys() == {"allocator", "task", "shuffled", "embedding", "best_static", "oracle"}
    assert all(0 <= policies[name]["beaten"]["mean"] <= 1 for name in ("task", "shuffled", "embedding"))
    budget = policies["allocator"]["budget"]
    assert 0 < budget["low"] <= budget["mean"] <= budget["high"] <= 1
    assert policies["oracle"]["quality_ratio"]["low"] > 0.999, "at the full model's mean score, or above"
    same = policies["task"].keys() - {"beaten"}
    assert same == policies["allocator"].keys() >= {"certified", "broken", "worse", "better"}
    assert readme.redrawn("tiny").count("\n") == 7
    assert "of 4 draws" in readme.bounds("tiny")
    assert readme.levels(kept).count("\n") == 1 + len(kept["certificates"])
    assert "the allocator" in readme.contributions(kept)


def test_generation_is_compared_end_to_end(model_folder, prompts_file, tmp_path, monkeypatch, measured, capsys) -> None:
    model, _ = load_backbone(str(model_folder))
    make_allocator(model).save_pretrained(tmp_path / "allocator")
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    data = ("--model", model_folder, "--allocator", tmp_path / "allocator", "--data", prompts_file)
    options = "--prompts 8 --new-tokens 4 --rounds 2 --name tiny --peers --sizes"
    first, result = (measured("end_to_end", "runtime-tiny", *data, options, size) for size in ("1,4", "1,4,offline"))
    assert result["runs"][:2] == first["runs"], "what was measured is kept"
    assert result["differing"] == {"rows": 8, "tokens": 0, "rows_parted_at_a_near_tie": 0}
    assert [run["batch"] for run in result["runs"]] == [1, 4, "offline"]
    chosen = result["layers_chosen"]
    assert 4 <= chosen < 6, "some prompts must skip layers, or nothing is compared"
    for run in result["runs"]:
        rows = run["contestants"]
        assert {"stock", "static", "allocator", "known", "ideal"} <= rows.keys()
        assert rows["stock"]["layers"] == 6
        assert rows["stock"]["quality"] == rows["stock"]["speedup"] == 1
        assert all(row["ms"] > 0 or row["ttft_ms"] > 0 for row in rows.values() if "not_run" not in row)
        assert all(rows[name].get("not_run") or rows[name]["ms"] > 0 for name in ("tide", "calm", "layer_skip"))
    single = result["runs"][0]["contestants"]
    assert single["allocator"]["layers"] == single["known"]["layers"] == single["ideal"]["layers"]
    assert single["allocator"]["quality"] == single["known"]["quality"] == single["ideal"]["quality"]
    assert single["early_exit"]["quality"] == 1, "drafting is lossless"
    assert single["early_exit"]["credible"] is None
    assert "allocator" not in result["settings"], "no paths"
    assert "0 differing tokens" in capsys.readouterr().out
    few = "--prompts 2 --new-tokens 4 --rounds 0 --name few --differing 2 --sizes 1 --only lossless"
    found = measured("end_to_end", "runtime-few", *data, few)
    ours = {name for name, row in found["runs"][0]["contestants"].items() if "not_run" not in row}
    assert ours == {"stock", "lossless"}
    assert found["runs"][0]["contestants"]["stock"]["rounds"] == 1
    assert found["differing"]["rows"] == 2


def test_speed_beyond_the_layers_left_out_is_marked() -> None:
    answers = timing.Answers()
    found = {name: timing.Measured(answers, 50, 0, [1.0]) for name in ("known", "ideal", "allocator", "layer_skip")}
    found["stock"] = timing.Measured(answers, 100, 0, [1.9])
    found["known"].seconds = [0.9]
    found["layer_skip"].seconds = [0.5]
    found["tide"] = "it failed"
    rows = end_to_end.rows_of(found, dict.fromkeys(found, 1.0), 6, 1, 1)["contestants"]
    assert rows["tide"] == {"not_run": "it failed"}
    assert rows["allocator"]["layers"] == 3
    assert rows["allocator"]["credible"] is True
    assert rows["known"]["credible"] is False, "2.1 times the speed with half of the layers"
    assert rows["layer_skip"]["credible"] is None


@pytest.mark.parametrize("name", ["end_to_end", "decode"])
def test_a_script_tells_its_options(name) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--help"]
    assert "--new-tokens" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
