"""Runs with other judges, controllers and prompts, in shards, interrupted, and with bad input."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ran, refused
from filelock import FileLock
from own_judges import rescored
from tiny_run import change_prompts

from oracle.judges import JudgeError, check_judge
from oracle.labels.store import CUT
from oracle.prompts import load_prompts
from oracle.splits import splits_of
from pipelines.config import load_config
from pipelines.config.sections import DataSection
from pipelines.run.state import STAGES


def test_ctrl_c_says_how_to_go_on_and_a_second_process_waits(config_file, tmp_path) -> None:
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
    ran("run", path, "--set", "tuning.trials=2")


def test_every_controller_and_option_of_the_report_card(config_file, prompts_file) -> None:
    path = config_file(
        tuning={"controllers": ["logistic", "mlp"], "trials": 2, "components": [4], "folds": 2},
        calibration={"risk": "insufficient", "keep": 0.7, "delta": 0.2, "per_task": True},
        data={"path": str(prompts_file), "force_judge": "kl"},
        label={"tolerance": 0.3},
        evaluation={"speed_prompts": 2, "speed_tokens": 2, "speed_rounds": 1},
    )
    ran("run", path)
    folder = path.parent / "runs" / "tiny"
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


def test_prompts_of_one_task_and_one_length_are_measured_too(config_file, prompts_file, tmp_path) -> None:
    """The task tells a control nothing: it is left out by name."""
    change_prompts(prompts_file, lambda number, row: row | {"task": "<script>$x$", "prompt": row["prompt"][:6]})
    said = ran("run", config_file(tuning={"components": [6], "folds": 2, "controllers": ["mlp"]}))
    folder, output = tmp_path / "runs" / "tiny", " ".join(said.split())
    assert "are fewer than tuning.search_from (500): default settings, no search" in output
    assert json.loads((folder / "tuning.json").read_text())["controllers"]["mlp"]["trials"] == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {row["policy"] for row in metrics["comparison"]["at_losses"]} == {"mlp", "shuffled", "embedding"}
    assert metrics["left_out"].keys() == {"the control 'task'"}
    page = (folder / "report.html").read_text()
    for name in metrics["left_out"]:
        assert f"{name} is left out: " in output
        assert name.replace("'", "&#39;") in page
    assert page.count("<svg") == 6
    assert "<script" not in page, "names of tasks are text"
    assert page.count("&lt;script&gt;$x$") >= 5


def label_count(folder: Path) -> int:
    with sqlite3.connect(folder / "runs" / "tiny" / "labels.db") as connection:
        return connection.execute("SELECT COUNT(*) FROM labels").fetchone()[0]


def test_shards_label_one_run_together(config_file, tmp_path) -> None:
    path = config_file()
    assert "the stage 'label' needs 'menu' first" in refused("label", path, "--shard", "1/2")
    ran("menu", path)
    assert "the stage 'label' needs 'adapt' first" in refused("label", path, "--shard", "1/2")
    ran("adapt", path)
    assert "a shard is written NUMBER/OF" in refused("label", path, "--shard", "3/2")
    with FileLock(tmp_path / "runs" / "tiny" / ".lock-1-of-2"):
        assert "another process is working on this shard of" in refused("label", path, "--shard", "1/2")
    counts = []
    for shard in ("1/2", "2/2", "2/2"):
        ran("label", path, "--shard", shard)
        counts.append(label_count(tmp_path))
    assert 0 < counts[0] < counts[1] == counts[2]
    ran("label", path)
    assert label_count(tmp_path) == counts[2]
    assert "done before" in ran("run", path)


def test_an_answer_that_a_judge_fails_on_counts_as_lost(config_file, prompts_file, tmp_path, monkeypatch) -> None:
    """The judge fails on every changed answer; a prompt is left out only where it fails on the full model's."""
    (tmp_path / "fussy.py").write_text(
        "def judge(answer, reference, full):\n    return 1 / len(reference) / (answer == full)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    change_prompts(
        prompts_file, lambda number, row: row | {"judge": "fussy:judge", "reference": "ab" if number % 20 else ""}
    )
    output = " ".join(ran("run", config_file()).split())
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


def test_judge_kl_needs_no_reference_and_only_full_answers(config_file, prompts_file) -> None:
    change_prompts(prompts_file, lambda number, row: row | {"judge": "kl"})
    ran("run", config_file(data={"path": str(prompts_file), "limit": 80}, label={"tolerance": 0.1}))
    folder = prompts_file.parent / "runs" / "tiny"
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


def test_device_cuda_without_a_gpu_is_refused(config_file) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "device 'cuda' was asked for, but this machine has 0 CUDA GPUs" in refused(
        "run", config_file(), "--device", "cuda"
    )


def test_help_reads_well() -> None:
    text = ran("--help")
    assert {*(stage.name for stage in STAGES), "run", "generate", "inspect"} <= {*text.split()}
    assert "resumes" in ran("run", "--help")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nsys.exit(0)\n", "SystemExit"),
        ("raise SystemExit\n", "SystemExit"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("judge = 5\n", "cannot be called"),
        ("import no_such_module\n", "no_such_module"),
        ("", "judge"),
    ],
)
def test_a_judge_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch, code, message) -> None:
    (tmp_path / "odd_judge.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd_judge", raising=False)
    with pytest.raises(JudgeError, match=message):
        check_judge("odd_judge:judge")
