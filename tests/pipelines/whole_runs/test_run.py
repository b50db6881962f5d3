"""All stages on a tiny model, through the command line: finished, repeated, changed, and read again."""

import io
import json
import re
import runpy
import shutil
import sqlite3
from contextlib import chdir, redirect_stdout
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import yaml
from command import ran, refused, snapshot
from markupsafe import escape
from tiny import tiny_model, tiny_tokenizer
from tiny_run import tiny_settings, write_prompts

from oracle.prompts import SPLITS, load_prompts
from oracle.splits import splits_of
from pipelines.config import load_config
from pipelines.config.sections import DataSection
from pipelines.evaluation.speed import NOISE
from pipelines.run.run_record import HEADLINES
from pipelines.run.state import content_hash
from pipelines.verdict import verdict

ROOT = Path(__file__).parents[3]
POLICIES = ["full", "best_static", "static_mixture", "random", "oracle", "lightgbm", "mlp"]


@pytest.fixture(scope="module")
def project(model_folder, give_store, tmp_path_factory):
    """A folder with a finished run, none of whose paths are absolute, and what the run said."""
    folder = tmp_path_factory.mktemp("project")
    write_prompts(folder / "prompts.jsonl")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings(Path(), model_folder, Path("prompts.jsonl"))))
    give_store(folder)
    with chdir(folder):
        return folder, ran("run", "tiny.yaml")


@pytest.fixture
def finished(project, tmp_path, monkeypatch):
    """A configuration that was run, its folder, and what the run said; a copy of its own, in the working folder."""
    folder, output = project
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("tiny.yaml"), Path("runs/tiny"), output


def test_a_run_leaves_everything_and_repeats_nothing(finished, monkeypatch) -> None:
    path, folder, output = finished
    left = {name for name, content in snapshot(folder).items() if content}
    assert left >= {"config.yaml", "menu.json", "labels.db", "features.parquet", "tuning.db", "metrics.json"}
    assert left >= {f"allocator/{name}" for name in ("manifest.json", "menu.json", "certificate.json", "README.md")}
    assert output.count("of 6 layers: ") == 2, "the two prompts were answered"
    assert f"mlflow ui --backend-store-uri {load_config(path).tracking.uri}\n" in output
    assert f"optuna-dashboard sqlite:///{folder}/tuning.db" in output
    _check_counts(output, path)
    _check_metrics(json.loads((folder / "metrics.json").read_text()))
    calibration = json.loads((folder / "calibration.json").read_text())
    assert calibration.keys() == {"best", "certificate", "certificates"}, "one controller is certified"
    _check_report((folder / "report.html").read_text(), json.loads((folder / "metrics.json").read_text()))
    _check_mlflow(folder.parent.parent / "mlruns")
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(folder.parent / "cache"))
    _check_inspect_and_generate(folder)
    before = snapshot(folder)
    assert ran("run", path).count("done before") == 9
    assert snapshot(folder) == before
    _check_changes(path, folder)


def _check_counts(output: str, path: Path) -> None:
    """A run begins with what `check` says; the disk has other room by now."""
    counts = ran("check", path).split("\ndisk")[0]
    assert "menu greedy (at most 4 plans)" in counts
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


def _check_report(page: str, metrics) -> None:
    assert page.count("<svg") == 6, "two of them also for narrow screens; one timed round shows no speed"
    assert "1 timed rounds are too few to tell a gain from noise" in page
    assert "The oracle's frontier" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "<script" not in page
    assert escape(verdict(metrics).sentences[0]) in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len({*ids}) == len(ids)
    assert {*re.findall(r'href="#([^"]+)"', page)} <= {*ids}
    assert all(f"mean score {metrics[name]['quality']:.3f} (" in page for name in POLICIES), "said by their dots"
    assert page.count("(full model ") == 2 * metrics["prompts"]["test"], "each test prompt has its dot"
    assert "confidence" in page
    assert "Does the controller know the prompt?" in page
    assert "control: shuffled features" in page
    assert page.count("(not certified)") == 1
    assert "Left out" not in page


def _check_mlflow(folder: Path) -> None:
    with sqlite3.connect(folder / "mlflow.db") as connection:
        rows = connection.execute
        ((name, begin, end),) = rows("SELECT name, start_time, end_time FROM runs")
        metrics, parameters = ({key for (key,) in rows(f"SELECT key FROM {table}")} for table in ("metrics", "params"))
        tags = dict(rows("SELECT key, value FROM tags"))
        inputs = dict(rows("SELECT name, dataset_source_type FROM datasets"))
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
    shown = ran("inspect", folder / "allocator")
    parts = ("Decides by", "Certificate", "Menu of", "Report card", "oracle", "Outliers", "Drift alarm")
    assert all(words in shown for words in (*parts, "not active after 0 prompts"))
    assert "of 6 layers: " in ran("generate", "--allocator", folder / "allocator", "abcabc", "--device", "cpu")
    example = runpy.run_path(str(ROOT / "examples" / "three_lines.py"))
    with redirect_stdout(io.StringIO()) as printed:
        example["main"](str(folder / "allocator"), "abcabc")
    assert printed.getvalue().startswith("abcabc")


def _check_changes(path: Path, folder: Path) -> None:
    """What a setting changes is done again, what it does not is kept, and going back keeps the labels."""
    other = ("--set", "calibration.delta=0.3")
    changed = ran("run", path, *other)
    assert changed.count("done before") == 6
    assert "calibrate: certify" in changed
    (folder / "metrics.json").write_text("{}")
    assert "evaluate: measure" in ran("run", path, *other)
    assert json.loads((folder / "metrics.json").read_text())["full"]
    with sqlite3.connect(folder / "labels.db") as connection:
        counts = [connection.execute("SELECT COUNT(*) FROM labels").fetchone()]
        assert "labels" in ran("label", path, *other)
        counts.append(connection.execute("SELECT COUNT(*) FROM labels").fetchone())
    assert counts[0] == counts[1]


def test_prompts_to_adapt_teach_and_judge_nothing(finished) -> None:
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
    ran("run", winner)
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


def test_a_folder_of_another_model_is_left_alone(finished, tmp_path) -> None:
    path, folder, _ = finished
    before = snapshot(folder)
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    message = refused("run", path, "--set", f"model.source={tmp_path / 'model'}")
    assert "belongs to the model" in message
    assert "--set name=tiny-2" in message
    wrong = refused("generate", "--allocator", folder / "allocator", "--model", tmp_path / "model", "abc")
    assert "this allocator was made for" in wrong
    assert snapshot(folder) == before
