"""Progress of whatever lasts, and the artifacts of finished runs in MLflow."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from command import refused

from pipelines.config import load_config
from pipelines.run.progress import Lines, console, duration
from pipelines.run.run_record import headlines, look_at, parameters
from pipelines.run.tracking import LOGGED, _experiment, log_verdict

ROOT = Path(__file__).parents[2]


def test_dry_run_is_refused_by_naming_check(config_file) -> None:
    assert "`layerbudget check CONFIG` counts prompts and tokens" in refused("run", config_file(), "--dry-run")


def test_where_there_is_no_terminal_a_line_comes_now_and_then(monkeypatch) -> None:
    lines, now = [], [0.0]
    monkeypatch.setattr(console, "print", lambda text, **options: lines.append(text))
    advance = Lines("labels", 1000, clock=lambda: now[0])
    for second in range(1, 101):
        now[0] = second
        advance(5)
    assert lines == [
        "  labels: 150 of 1,000, 2.8 min left",
        "  labels: 300 of 1,000, 2.3 min left",
        "  labels: 450 of 1,000, 1.8 min left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "1.5 min"), (5000, "83.3 min"), (36000, "10.0 h")]
)
def test_durations_are_told_in_the_unit_that_suits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def config():
    yield SimpleNamespace(tracking=SimpleNamespace(experiment="mine", uri=""))
    mlflow.set_tracking_uri(None)


def logged(config, project: Path, text: str) -> str:
    """The id of a run with one artifact, logged as the stage `report` does."""
    (project / "mlruns").mkdir(parents=True, exist_ok=True)
    config.tracking.uri = f"sqlite:///{project}/mlruns/mlflow.db"
    mlflow.set_tracking_uri(config.tracking.uri)
    with mlflow.start_run(experiment_id=_experiment(config)) as run:
        mlflow.log_text(text, "note.txt")
    return str(run.info.run_id)


def note(run: str) -> str:
    return Path(mlflow.artifacts.download_artifacts(run_id=run, artifact_path="note.txt")).read_text()


def test_artifacts_are_found_after_a_move_and_a_copy(config, tmp_path) -> None:
    first = logged(config, tmp_path / "project", "first")
    shutil.copytree(tmp_path / "project", tmp_path / "copy")
    (tmp_path / "project").rename(tmp_path / "moved")
    for place in ("moved", "copy"):
        second = logged(config, tmp_path / place, place)
        assert (note(first), note(second)) == ("first", place)
        assert (tmp_path / place / "mlruns" / "artifacts" / second / "artifacts" / "note.txt").is_file()
    assert not (tmp_path / "project").exists()


def test_artifacts_kept_elsewhere_stay_there(config, tmp_path) -> None:
    (tmp_path / "project" / "mlruns").mkdir(parents=True)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/project/mlruns/mlflow.db")
    mlflow.create_experiment("mine", artifact_location=(tmp_path / "elsewhere").as_uri())
    runs = [logged(config, tmp_path / "project", text) for text in ("one", "two")]
    assert [note(run) for run in runs] == ["one", "two"]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


def test_a_verdict_is_put_on_the_logged_run(config, tmp_path) -> None:
    run = logged(config, tmp_path / "project", "text")
    config.folder = tmp_path
    (tmp_path / LOGGED).write_text(json.dumps({"uri": config.tracking.uri, "run": run}))
    log_verdict(config, "worth_it")
    assert mlflow.get_run(run).data.tags["verdict"] == "worth_it"


def test_few_metrics_and_the_winner_stand_for_a_run() -> None:
    metrics = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["metrics"]
    found = headlines(metrics)
    assert 10 < len(found) <= 16
    assert found["quality"] == metrics[metrics["best"]]["quality"]
    assert found["speedup_single"] == metrics["speed"]["speedup_single"]
    assert headlines({**metrics, "captured_headroom": None}).keys() == found.keys() - {"captured_headroom"}
    settings = {"name": "mlp", "sets": ["path"], "components": 6, "parameters": {"hidden": 8}}
    config = load_config(ROOT / "configs" / "demo.yaml")
    given = parameters(config, {"best": "mlp", "controllers": {"mlp": {"settings": settings}}})
    assert (given["winner.controller"], given["winner.hidden"], given["winner.sets"]) == ("mlp", 8, ["path"])
    assert given["calibration.keep"] == config.calibration.keep


def test_the_commands_to_look_at_a_run_name_its_stores(tmp_path) -> None:
    config = load_config(ROOT / "configs" / "demo.yaml", [f"runs={tmp_path}", "tracking.uri=sqlite:///a/b.db"])
    assert look_at(config) == ["Compare runs:    mlflow ui --backend-store-uri sqlite:///a/b.db"], "none was searched"
    config.folder.mkdir()
    (config.folder / "tuning.db").touch()
    assert f"optuna-dashboard sqlite:///{config.folder}/tuning.db " in look_at(config)[1]
    elsewhere = load_config(ROOT / "configs" / "demo.yaml", [f"runs={tmp_path}", "tuning.storage=sqlite:///c.db"])
    assert "optuna-dashboard sqlite:///c.db " in look_at(elsewhere)[1]
