"""All stages on a tiny model, through the command line: finished, repeated, changed, killed, and given bad input."""

import io
import json
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import chdir, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pyarrow.parquet as parquet
import pytest
import yaml
from command import layerbudget, refused, snapshot
from filelock import FileLock
from own_judges import rescored
from tiny import tiny_model, tiny_tokenizer
from tiny_run import tiny_settings, write_prompts

from oracle.labels.store import CUT
from oracle.prompts import SPLITS, load_prompts
from oracle.splits import splits_of
from pipelines.config import load_config
from pipelines.config.sections import DataSection
from pipelines.evaluation.speed import NOISE
from pipelines.run.run_record import HEADLINES
from pipelines.run.state import content_hash

ROOT = Path(__file__).parents[2]
POLICIES = ["full", "best_static", "static_mixture", "random", "oracle", "lightgbm", "mlp"]


@pytest.fixture(scope="module")
def project(model_folder, give_store, tmp_path_factory):
    """A folder with a finished run, none of whose paths are absolute, and what the run said."""
    folder = tmp_path_factory.mktemp("project")
    write_prompts(folder / "prompts.jsonl")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings(Path(), model_folder, Path("prompts.jsonl"))))
    give_store(folder)
    with chdir(folder):
        done = layerbudget("run", "tiny.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture
def finished(project, tmp_path, monkeypatch):
    """A configuration that was run, its folder, and what the run said; a copy of its own, in the working folder."""
    folder, output = project
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("tiny.yaml"), Path("runs/tiny"), output


def test_a_run_leaves_everything_and_repeats_nothing(finished, monkeypatch) -> None:
    path, folder, output = finished
    for name in (
        "config.yaml",
        "menu.json",
        "labels.db",
        "features.parquet",
        "tuning.db",
        "metrics.json",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert {file.name for file in (folder / "allocator").iterdir()} >= {
        "manifest.json",
        "menu.json",
        "certificate.json",
        "README.md",
    }
    assert output.count("of 6 layers: ") == 2, "the two prompts were answered"
    assert f"mlflow ui --backend-store-uri {load_config(path).tracking.uri}\n" in output
    assert f"optuna-dashboard sqlite:///{folder}/tuning.db" in output
    _check_counts(output, path)
    _check_metrics(json.loads((folder / "metrics.json").read_text()))
    calibration = json.loads((folder / "calibration.json").read_text())
    assert calibration.keys() == {"best", "certificate", "certificates"}, "one controller is certified"
    _check_report((folder / "report.html").read_text())
    _check_mlflow(folder.parent.parent / "mlruns")
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(folder.parent / "cache"))
    _check_inspect_and_generate(folder)
    before = snapshot(folder)
    again = layerbudget("run", path)
    assert again.stdout.count("done before") == 9
    assert snapshot(folder) == before
    _check_changes(path, folder)


def _check_counts(output: str, path: Path) -> None:
    """A run begins with what `check` says; the disk has other room by now."""
    counts = layerbudget("check", path).stdout.split("\ndisk")[0]
    assert "menu greedy_layers (at most 4 plans)" in counts
    assert output.split()[: len(counts.split())] == counts.split()


def _check_metrics(metrics) -> None:
    for name in POLICIES:
        assert {"quality", "quality_ratio", "budget", "layers", "tokens_per_s"} <= metrics[name].keys(), name
    assert metrics["full"]["quality_ratio"] == metrics["full"]["budget"] == 1
    assert metrics["full"]["loss"] == 0
    assert metrics["oracle"]["loss"] <= 1e-9, "of the mean score, which may be above the full model's"
    assert metrics["oracle"]["budget"] <= metrics["full"]["budget"]
    assert metrics["random"]["budget"] == pytest.approx(metrics[metrics["best"]]["budget"], abs=0.05)
    assert metrics["certificate"]["n"] == metrics["prompts"]["calibrate"]
    assert metrics["labelling"]["forward_tokens"] > 0
    assert metrics["overhead_ms"] > 0
    assert metrics["speed"]["credible"] == (
        metrics["speed"]["speedup_single"] <= metrics["speed"]["speedup_limit"] * NOISE
    )
    assert metrics["machine"]["torch"]
    assert "captured_headroom" in metrics
    _check_comparison(metrics)
    _check_frontier(metrics)


def _check_frontier(metrics) -> None:
    frontier = metrics["frontier"]
    figures = [frontier[name] for name in ("equal_mean_budget", "own_score_budget", "headroom")]
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures)
    assert (
        frontier["equal_mean_budget"]["value"] <= metrics["oracle"]["budget"] <= frontier["own_score_budget"]["value"]
    )
    assert frontier["captured_headroom"]["value"] == pytest.approx(metrics["captured_headroom"])
    assert "flatter" in frontier["caveat"]


def _check_comparison(metrics) -> None:
    rows = metrics["comparison"]["at_losses"]
    assert {row["keep"] for row in rows} == {0.7}
    assert {row["policy"] for row in rows} == {"lightgbm", "mlp", "shuffled", "task", "embedding"}
    assert all(0 < row["budget"] <= 1 and row["loss"] >= 0 for row in rows)
    assert [row["keep"] for row in metrics["certificates"]] == [0.7]
    assert metrics["outliers"]["rate"] == 0.05
    assert 0 <= metrics["outliers"]["sent"] < 0.3
    assert metrics["comparison"]["knows_the_prompt"] in (True, False)
    assert metrics["left_out"] == {}
    pooled = metrics["comparison"]["pooled"]
    assert pooled["prompts"] == sum(metrics["prompts"][name] for name in ("train", "tune", "test"))
    assert 0 < metrics["labelling"]["calibrate_share"] <= 1
    assert pooled["against"].keys() == {"static_mixture", "shuffled", "task"}
    assert metrics["judges"] == {"agreement": metrics["prompts"]["test"]}
    assert metrics["worst_task"]["task"] in ("long", "short")
    assert metrics["feature_ms"].keys() == {"length", "tokens", "embedding", "states", "windows", "path"}
    assert metrics["lightgbm"]["regret"] >= -1e-9


def _check_report(page: str) -> None:
    assert page.count("<svg") == 5
    assert "The oracle's frontier" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "https://" not in page.replace("https://matplotlib.org", "")
    assert "<script" not in page
    assert "confidence" in page
    assert "Does the controller know the prompt?" in page
    assert "control: shuffled features" in page
    assert page.count("(not certified)") == 1
    assert "Left out" not in page


def _check_mlflow(folder: Path) -> None:
    with sqlite3.connect(folder / "mlflow.db") as connection:

        def rows(query: str) -> list[tuple]:
            return connection.execute(query).fetchall()

        ((name, begin, end),) = rows("SELECT name, start_time, end_time FROM runs")
        metrics, parameters = ({key for (key,) in rows(f"SELECT key FROM {table}")} for table in ("metrics", "params"))
        tags, inputs = (
            dict(rows("SELECT key, value FROM tags")),
            dict(rows("SELECT name, dataset_source_type FROM datasets")),
        )
        counts = dict(rows("SELECT name, value FROM input_tags"))
    stages = json.loads((folder.parent / "runs/tiny/run.json").read_text())["stages"]
    seconds = sum(entry["seconds"] for stage, entry in stages.items() if stage != "report")
    assert name == "tiny"
    assert seconds <= (end - begin) / 1000 < seconds + 60
    assert metrics == {name for name in HEADLINES if name in metrics} >= {"quality", "oracle.budget", "overhead_ms"}
    assert {"model.source", "calibration.keep", "tuning.trials", "winner.controller", "winner.sets"} <= parameters
    assert tags["controller"] in ("lightgbm", "mlp")
    assert (tags["judge"], tags["certified"]) == ("agreement", "true")
    assert inputs == {"prompts.jsonl": "local"}
    assert sum(int(counts[split]) for split in SPLITS) == 160
    artifacts = {path.name for path in (folder / "artifacts").rglob("*")}
    assert {"report.html", "manifest.json", "quality.svg", "config.yaml", "tuning.json", "metrics.json"} <= artifacts


def _check_inspect_and_generate(folder: Path) -> None:
    shown = layerbudget("inspect", folder / "allocator").stdout
    for words in (
        "Price",
        "Certificate",
        "Menu of",
        "Report card",
        "oracle",
        "Outliers",
        "Drift alarm",
        "silent after 0 prompts",
    ):
        assert words in shown
    answered = layerbudget("generate", "--allocator", folder / "allocator", "abcabc", "--device", "cpu")
    assert "of 6 layers: " in answered.stdout, answered.stderr
    example = runpy.run_path(str(ROOT / "examples" / "three_lines.py"))
    with redirect_stdout(io.StringIO()) as printed:
        example["main"](str(folder / "allocator"), "abcabc")
    assert printed.getvalue().startswith("abcabc")
    prompts, out = folder.parent / "some.jsonl", folder.parent / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"id": name, "prompt": name * 2}) + "\n" for name in ("ab", "cd", "efg")))
    arguments = ("--allocator", folder / "allocator", "--prompts", prompts, "--out", out, "--batch-size", 2)
    assert layerbudget("generate", *arguments).returncode == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["ab", "cd", "efg"]
    assert all({"answer", "layers", "plan"} <= row.keys() for row in rows)


def _check_changes(path: Path, folder: Path) -> None:
    """What a setting changes is done again, what it does not is kept, and going back keeps the labels."""
    changed = layerbudget("run", path, "--set", "calibration.delta=0.3").stdout
    assert changed.count("done before") == 6
    assert "calibrate: certify" in changed
    (folder / "metrics.json").write_text("{}")
    repaired = layerbudget("run", path, "--set", "calibration.delta=0.3").stdout
    assert "evaluate: measure" in repaired
    assert json.loads((folder / "metrics.json").read_text())["full"]
    with sqlite3.connect(folder / "labels.db") as connection:
        (before,) = connection.execute("SELECT COUNT(*) FROM labels").fetchone()
    assert "labels" in layerbudget("label", path, "--set", "calibration.delta=0.3").stdout
    with sqlite3.connect(folder / "labels.db") as connection:
        assert connection.execute("SELECT COUNT(*) FROM labels").fetchone() == (before,)


def test_ctrl_c_says_that_the_run_goes_on_and_a_second_process_waits_its_turn(config_file, tmp_path) -> None:
    path = config_file(tuning={"search_from": 0, "trials": 5000})  # so that the run is not over before it is stopped
    command = [sys.executable, "-m", "layerbudget", "run", str(path)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "runs" / "tiny" / "labels.db").exists() and run.poll() is None:
        time.sleep(0.02)
    assert "another process is working on" in refused("run", path)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "stopped; the same command goes on from here" in errors
    assert layerbudget("run", path, "--set", "tuning.trials=2").returncode == 0


def test_prompts_that_healing_are_fitted_on_teach_and_judge_nothing(finished) -> None:
    _, folder, _ = finished
    prompts = load_prompts("prompts.jsonl")
    parts = splits_of(prompts, DataSection().shares)
    splits = {prompt.hash: split for split, some in parts.items() for prompt in some}
    plans = [plan["runs"] for plan in json.loads((folder / "menu.json").read_text())["plans"]]
    found: dict[str, set[str]] = {}
    with sqlite3.connect(folder / "labels.db") as connection:
        for prompt, plan in connection.execute("SELECT DISTINCT prompt, plan FROM labels"):
            found.setdefault(splits[prompt], set()).add(plan)
    assert {"0-5"} <= found["calibrate"] <= set(plans)
    del found["calibrate"]
    assert found == {"adapt": {"0-5"}} | {split: set(plans) for split in ("train", "tune", "test")}
    seen = parquet.read_table(folder / "features.parquet").column("id").to_pylist()
    assert set(seen) == {prompt.id for prompt in prompts if splits[prompt.hash] != "adapt"}


def test_the_winner_is_made_again_without_a_search(finished, tmp_path) -> None:
    _, folder, _ = finished
    winner = tmp_path / "winner.yaml"
    winner.write_text((folder / "winner.yaml").read_text())
    done = layerbudget("run", winner)
    assert done.returncode == 0, done.stdout + done.stderr
    again = folder.parent / "tiny-winner"
    found, made = (json.loads((path / "tuning.json").read_text()) for path in (folder, again))
    best = found["best"]
    assert made["controllers"].keys() == {best}
    assert made["controllers"][best]["settings"] == found["controllers"][best]["settings"]
    assert made["controllers"][best]["regret"] == pytest.approx(found["controllers"][best]["regret"])
    for name in (file.name for file in (folder / "controllers" / best).iterdir()):
        assert (folder / "controllers" / best / name).read_bytes() == (again / "controllers" / best / name).read_bytes()


def test_features_of_another_model_are_refused(finished) -> None:
    path, folder, _ = finished
    table = parquet.read_table(folder / "features.parquet")
    parquet.write_table(table.replace_schema_metadata({"model": "llama-6x32-other"}), folder / "features.parquet")
    state = json.loads((folder / "run.json").read_text())
    state["stages"]["features"]["files"]["features.parquet"] = content_hash(folder / "features.parquet")
    (folder / "run.json").write_text(json.dumps(state))
    assert "was made with the model llama-6x32-other, this run's is llama-6x32-" in refused("tune", path)


def test_every_controller_and_option_of_the_report_card(config_file, prompts_file) -> None:
    path = config_file(
        tuning={"controllers": ["logistic", "mlp"], "trials": 2, "components": [4], "folds": 2},
        calibration={"risk": "insufficient", "keep": 0.7, "delta": 0.2, "per_task": True},
        data={"path": str(prompts_file), "force_judge": "kl"},
        label={"tolerance": 0.3},
        evaluation={
            "speed_prompts": 2,
            "speed_tokens": 2,
            "speed_rounds": 1,
        },
    )
    done = layerbudget("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["best"] in ("logistic", "mlp")
    assert metrics["certificate"]["risk"] == "insufficient"
    assert metrics["certificate"]["per_task"].keys() == {"short", "long"}
    assert "in each task," in metrics["certificate"]["sentence"]
    own = rescored(load_config(path), 4)
    assert own["full"] == own["static"][-1][1] == 1, "every full answer agrees with itself"
    assert own["prompts"] == 4 < metrics["prompts"]["test"]
    assert 0 <= own["policies"][metrics["best"]]["quality_ratio"] <= 1
    page = (folder / "report.html").read_text()
    assert "No gain is shown over" in page or metrics["comparison"]["knows_the_prompt"]


ADAPTED = {"epochs": 4, "batch_tokens": 256, "lora_rank": 4, "prompts": 40}


@pytest.mark.parametrize("method", ["none", "bridges", "adapter", "both"])
def test_shortened_plans_are_adapted_in_every_way(config_file, method) -> None:
    path = config_file(adapt={"method": method, **ADAPTED})
    done = layerbudget("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    record = json.loads((folder / "adapt.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert record["method"] == metrics["healing"]["method"] == method
    assert ("bridges" in record) == (method in ("bridges", "both"))
    assert (f"training_{method}" in record) == (method in ("adapter", "both"))
    added = sum(record["added_budget"].values())
    assert (added > 0) == (method in ("bridges", "both"))
    assert (folder / "allocator" / "healing.safetensors").exists() == (method != "none")
    with sqlite3.connect(folder.parent.parent / "mlruns" / "mlflow.db") as connection:
        keys = {key for (key,) in connection.execute("SELECT DISTINCT key FROM metrics")}
    assert any(key.startswith(f"training_{method}/held_kl/0-") for key in keys) == (method in ("adapter", "both"))
    budgets = [budget for budget, _ in metrics["healing"]["after"]["static"]]
    frozen = [plan["budget"] for plan in json.loads((folder / "menu.json").read_text())["plans"]]
    assert sum(budgets) == pytest.approx(sum(frozen) + added)


def test_healing_of_another_run_are_taken(config_file) -> None:
    """A GPU may train what a CPU labels with: the second run trains nothing, and has the same healing parts."""
    path = config_file(adapt={"method": "both", **ADAPTED})
    for stage in ("menu", "adapt"):
        assert layerbudget(stage, path).returncode == 0
    first = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    given = config_file(
        "second.yaml", name="second", adapt={"method": "given", "given": str(first / "healing.safetensors")}
    )
    for stage in ("menu", "adapt"):
        done = layerbudget(stage, given)
        assert done.returncode == 0, done.stdout + done.stderr
    second = first.parent / "second"
    records = [json.loads((folder / "adapt.json").read_text()) for folder in (first, second)]
    assert records[1]["method"] == "given"
    assert [record["digest"] for record in records] == [records[0]["digest"]] * 2
    assert records[0]["added_budget"] == records[1]["added_budget"]
    assert not any(name.startswith("training") for name in records[1])
    done = layerbudget("adapt", given, "--set", "menu.plans=3")
    assert done.returncode == 2, "another menu needs its stage first"
    assert layerbudget("menu", given, "--set", "menu.plans=3", "--set", "menu.method=exiting").returncode == 0
    said = refused("adapt", given, "--set", "menu.plans=3", "--set", "menu.method=exiting")
    assert "has no bridges for the plan" in said


def test_given_healing_must_be_there(config_file) -> None:
    path = config_file(adapt={"method": "given", "given": "nowhere.safetensors"})
    assert "adapt.given: there is no file nowhere.safetensors" in refused("check", path)


def test_prompts_of_one_task_and_one_length_are_measured_too(config_file, tmp_path) -> None:
    """The task tells a control nothing: it is left out by name, and so is the picture of a search."""
    rows = [
        {**json.loads(line), "task": "only", "prompt": json.loads(line)["prompt"][:6]}
        for line in write_prompts(tmp_path / "two.jsonl").read_text().splitlines()
    ]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tuning = {"components": [6], "folds": 2, "controllers": ["mlp"]}
    done = layerbudget("run", config_file(data={"path": str(tmp_path / "one.jsonl")}, tuning=tuning))
    assert done.returncode == 0, done.stdout + done.stderr
    folder, output = tmp_path / "runs" / "tiny", " ".join(done.stdout.split())
    assert "are fewer than tuning.search_from (500): default settings, no search" in output
    assert json.loads((folder / "tuning.json").read_text())["controllers"]["mlp"]["trials"] == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {row["policy"] for row in metrics["comparison"]["at_losses"]} == {"mlp", "shuffled", "embedding"}
    assert metrics["left_out"].keys() == {"the control 'task'"}
    page = (folder / "report.html").read_text()
    for name in (*metrics["left_out"], "the picture 'importance'"):
        assert f"{name} is left out: " in output
        assert name.replace("'", "&#39;") in page
    assert page.count("<svg") == 4


def test_the_best_way_to_adapt_is_measured_on_the_tune_split(config_file) -> None:
    path = config_file(adapt={"method": "best", **ADAPTED})
    done = layerbudget("adapt", path, "--set", "menu.plans=3")
    assert done.returncode == 2
    done = layerbudget("menu", path)
    done = layerbudget("adapt", path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    record = json.loads((folder / "adapt.json").read_text())
    areas = {method: row["area"] for method, row in record["compared"].items()}
    assert set(areas) == {"none", "bridges", "adapter", "both"}
    assert record["method"] == max(areas, key=lambda method: areas[method])


def test_too_few_tokens_for_full_bridges_are_said(config_file) -> None:
    path = config_file(adapt={"method": "bridges", "prompts": 8})
    layerbudget("menu", path)
    with patch("backbone.healing.ridge_regression.TOKENS_PER_INPUT", 50):
        done = layerbudget("adapt", path)
    assert "too few for full bridges" in done.stdout


def test_shards_label_one_run_together(config_file, tmp_path) -> None:
    path = config_file()
    assert "the stage 'label' needs 'menu' first" in refused("label", path, "--shard", "1/2")
    assert layerbudget("menu", path).returncode == 0
    assert "the stage 'label' needs 'adapt' first" in refused("label", path, "--shard", "1/2")
    assert layerbudget("adapt", path).returncode == 0
    assert "a shard is written NUMBER/OF" in refused("label", path, "--shard", "3/2")
    with FileLock(tmp_path / "runs" / "tiny" / ".lock-1-of-2"):
        assert "another process is working on this shard of" in refused("label", path, "--shard", "1/2")
    counts = []
    for shard in ("1/2", "2/2", "2/2"):
        assert layerbudget("label", path, "--shard", shard).returncode == 0
        with sqlite3.connect(tmp_path / "runs" / "tiny" / "labels.db") as connection:
            counts += connection.execute("SELECT COUNT(*) FROM labels").fetchone()
    assert 0 < counts[0] < counts[1] == counts[2]
    assert layerbudget("label", path).returncode == 0
    with sqlite3.connect(tmp_path / "runs" / "tiny" / "labels.db") as connection:
        assert connection.execute("SELECT COUNT(*) FROM labels").fetchone() == (counts[2],)
    assert "done before" in layerbudget("run", path).stdout


def test_an_answer_that_a_judge_fails_on_counts_as_lost(config_file, prompts_file, tmp_path, monkeypatch) -> None:
    """The judge fails on every changed answer; a prompt is left out only where it fails on the full model's."""
    (tmp_path / "fussy.py").write_text(
        "def judge(answer, reference, full):\n    return 1 / len(reference) / (answer == full)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"judge": "fussy:judge", "reference": "" if number % 20 == 0 else "ab"}
    prompts_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = layerbudget("run", config_file())
    assert done.returncode == 0, done.stdout + done.stderr
    output = " ".join(done.stdout.split())
    assert "labels have no score, the first since the judge 'fussy:judge' failed on prompt" in output
    metrics = json.loads((tmp_path / "runs" / "tiny" / "metrics.json").read_text())
    assert metrics["full"]["quality"] == 0.5
    assert min(quality for _, quality in metrics["healing"]["after"]["static"]) < 0.4
    certificate = metrics["certificate"]
    prompts = load_prompts(str(prompts_file))
    failing = {prompt.id for prompt in prompts[::20]}
    calibrate = splits_of(prompts, DataSection().shares)["calibrate"]
    assert certificate["left_out"] == sum(prompt.id in failing for prompt in calibrate) > 0
    assert certificate["n"] + certificate["left_out"] == metrics["prompts"]["calibrate"]
    assert (
        f"Left out: {certificate['left_out']} of {metrics['prompts']['calibrate']} prompts" in certificate["sentence"]
    )


def test_the_judge_kl_needs_no_reference_and_generates_the_full_answers_only(config_file, prompts_file) -> None:
    rows = [json.loads(line) | {"judge": "kl"} for line in prompts_file.read_text().splitlines()[:80]]
    prompts_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = config_file(label={"tolerance": 0.1})
    done = layerbudget("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    with sqlite3.connect(folder / "labels.db") as store:
        labels = store.execute("SELECT plan, answer, score FROM labels").fetchall()
    assert {score for plan, _, score in labels if plan == "0-5"} == {1.0}
    assert all(answer == CUT and 0 < score < 1 for plan, answer, score in labels if plan != "0-5")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["full"]["quality"] == 1
    assert metrics["random"]["quality"] <= 1
    assert 0 <= metrics["oracle"]["loss"] <= 0.1, "within the tolerance"
    assert metrics["oracle"]["budget"] < 1
    assert metrics["labelling"]["ratio_to_exhaustive"] < 1
    rates = json.loads((folder / "allocator" / "acceptance.json").read_text())
    assert rates.pop("0-5") == 1
    assert all(0 < rate < 1 for rate in rates.values()), "what a plan says is not all the full model's"


def test_a_single_stage_names_the_one_it_needs(config_file) -> None:
    assert "the stage 'train' needs 'menu' first" in refused("train", config_file())


def test_a_folder_of_another_config_or_model_is_left_alone(finished, tmp_path) -> None:
    path, folder, _ = finished
    before = snapshot(folder)
    other = shutil.copy(path, "other.yaml")
    assert "belongs to the config ../../tiny.yaml, not ../../other.yaml" in refused("run", other)
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    message = refused("run", path, "--set", f"model.source={tmp_path / 'model'}")
    assert "belongs to the model" in message
    assert "--set name=tiny-2" in message
    wrong = refused("generate", "--allocator", folder / "allocator", "--model", tmp_path / "model", "abc")
    assert "this allocator was made for" in wrong
    damaged = next((folder / "allocator").glob("controller.*"))
    damaged.write_text("{}")
    for command in (("inspect", folder / "allocator"), ("generate", "--allocator", folder / "allocator", "abc")):
        assert f"is damaged: {damaged.name}" in refused(*command)
    after = snapshot(folder)
    assert {name for name in before if after[name] != before[name]} == {f"allocator/{damaged.name}"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.path=none.jsonl"], "no prompts file none.jsonl"),
        (["model.source=./nowhere"], "no model in the folder nowhere"),
        (["model.device=cuda:77"], "device 'cuda:77' was asked for, but this machine has"),
        (
            ["menu={method: given, given: ['0,2-5'], probe_depth: 2}"],
            "skips layer 1, but every plan runs the first 2 layers",
        ),
        (["menu={method: given, given: ['0-9']}"], "layer 6 is outside the model"),
        (["menu.probe_depth=6"], "probe_depth must be from 1 to 5 for this model, got 6"),
        (
            ["data.limit=8", "data.shares={adapt: 0.2, train: 0.7, tune: 0.1, calibrate: 0.0, test: 0.0}"],
            "leave 1 for the split 'tune'",
        ),
        (["unknown=1"], "unknown key 'unknown'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(config_file, settings, message) -> None:
    path = config_file()
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    assert message in refused("run", path, *arguments)


def test_device_cuda_without_a_gpu_is_refused(config_file) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "device 'cuda' was asked for, but this machine has 0 CUDA GPUs" in refused(
        "run", config_file(), "--device", "cuda"
    )


def test_help_reads_well() -> None:
    text = layerbudget("--help").stdout
    for name in (
        "run",
        "menu",
        "label",
        "features",
        "tune",
        "train",
        "calibrate",
        "evaluate",
        "report",
        "generate",
        "inspect",
    ):
        assert name in text
    assert "resumes" in layerbudget("run", "--help").stdout
