"""Whose folder a run may use, and what counts as done."""

import json
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
import yaml
from command import ran, refused, snapshot
from tiny_run import change_prompts, tiny_settings, write_prompts

from pipelines.run.state import content_hash


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder, give_store) -> Path:
    """A project whose run is finished."""
    folder = tmp_path_factory.mktemp("made")
    settings = tiny_settings(folder, model_folder, write_prompts(folder / "prompts.jsonl")) | {
        "menu": {"method": "exits", "probe_depth": 2, "plans": 3, "cheapest_budget": 0.4},
        "tuning": {"trials": 1, "components": [4], "folds": 2, "controllers": ["lightgbm"]},
        "try_prompts": [],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    give_store(folder)
    ran("run", folder / "tiny.yaml")
    return folder


@pytest.fixture
def project(made, tmp_path) -> Path:
    """A copy of it, with its configuration pointing at the copy."""
    folder = tmp_path / "project"
    shutil.copytree(made, folder)
    point_at(folder)
    return folder


def point_at(folder: Path) -> None:
    """Name a copy's own prompts and runs in its configuration."""
    config = yaml.safe_load((folder / "tiny.yaml").read_text())
    config["runs"], config["data"]["path"] = str(folder / "runs"), str(folder / "prompts.jsonl")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))


USER_FILES = {
    "config.yaml": "mine",
    "menu.json": "{}",
    "labels.db": "mine",
    "allocator/model.safetensors": "weights",
    "report.html": "mine",
    ".healing.unfinished": "mine",
    "notes.txt": "mine",
}


@pytest.mark.parametrize("command", ["run", "menu", "label"])
def test_a_folder_with_somebodys_files_is_left_alone(project, command) -> None:
    folder = project / "runs" / "other"
    for name, text in USER_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = snapshot(project)
    message = refused(command, project / "tiny.yaml", "--set", "name=other")
    assert "holds 'allocator', but no run" in message
    assert snapshot(project) == before


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("train", "controllers/notes.txt"),
        ("train", "controllers/mine/controller.json"),
        ("train", "controllers/lightgbm/notes.txt"),
        ("run", "controllers/notes.txt"),
        ("adapt", "adapt/notes.txt"),
    ],
)
def test_somebodys_file_in_a_folder_that_is_replaced_stays(project, stage, file) -> None:
    theirs = project / "runs" / "tiny" / file
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("mine")
    assert f"{theirs} lies in a folder that a stage replaces" in refused(stage, project / "tiny.yaml")
    assert theirs.read_text() == "mine"
    theirs.unlink()
    ran("run", project / "tiny.yaml")


def test_a_file_in_the_place_of_the_folder_is_left_alone(project) -> None:
    other = project / "runs" / "other"
    other.write_text("mine")
    assert "is a file" in refused("run", project / "tiny.yaml", "--set", "name=other")
    assert other.read_text() == "mine"
    other.unlink()
    other.mkdir()
    ran("menu", project / "tiny.yaml", "--set", "name=other")  # an empty folder is used


def test_projects_of_one_name_do_not_share_a_run(project, tmp_path) -> None:
    """Their files have the same name, and they keep their runs in the same place."""
    (tmp_path / "second").mkdir()
    shutil.copy(project / "tiny.yaml", tmp_path / "second" / "tiny.yaml")
    before = snapshot(project)
    for command in ("run", "menu"):
        message = refused(command, tmp_path / "second" / "tiny.yaml")
        assert "belongs to the config ../../tiny.yaml, not ../../../second/tiny.yaml" in message
    assert snapshot(project) == before


def test_a_project_that_was_moved_goes_on(project, tmp_path) -> None:
    moved = tmp_path / "moved"
    project.rename(moved)
    point_at(moved)
    assert ran("run", moved / "tiny.yaml").count("done before") == 9


def test_a_config_in_its_own_run_folder_is_not_overwritten(project) -> None:
    inside = project / "runs" / "tiny" / "mine.yaml"
    shutil.copy(project / "tiny.yaml", inside)
    before = snapshot(project)
    assert "lies in the folder of its own run" in refused("run", inside)
    assert snapshot(project) == before


def check_answers(project: Path) -> None:
    """A finished run only answers."""
    said = ran("run", project / "tiny.yaml", "--set", 'try_prompts=["abc"]')
    assert said.count("done before") == 9
    assert "of 6 layers" in said


def test_a_finished_run_writes_nothing(project, monkeypatch) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (project / "runs").rglob("*") if path.is_file()}

    before = times()

    def forbidden(*arguments: object, **options: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    monkeypatch.setattr("tempfile.mkstemp", forbidden)
    monkeypatch.setattr("pipelines.run.runner.FileLock", forbidden)
    check_answers(project)
    assert times() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")
def test_a_finished_run_answers_from_a_read_only_folder(project) -> None:
    """Also for a superuser, whom modes do not stop."""
    mounted = subprocess.run(["mount", "--bind", "-r", str(project), str(project)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this process may not mount")
    try:
        with pytest.raises(OSError, match="Read-only"):
            (project / "try").write_text("")
        check_answers(project)
    finally:
        subprocess.run(["umount", "--lazy", str(project)], check=True)


@pytest.mark.parametrize("all_are_lost", [False, True])
def test_labels_that_are_missing_are_made_again_and_nothing_else(project, all_are_lost) -> None:
    folder = project / "runs" / "tiny"
    before = snapshot(folder)
    if all_are_lost:
        (folder / "labels.db").unlink()
    else:
        with sqlite3.connect(folder / "labels.db") as store:
            store.execute("DELETE FROM labels WHERE prompt >= '8'")
    said = ran("run", project / "tiny.yaml")
    assert "label: answer and judge" in said
    assert said.count("done before") == 8, "the labels are the same, so what follows is"
    after = snapshot(folder)
    changed = {name for name in before if not name.startswith("labels.db") and after[name] != before[name]}
    assert changed <= {"run.json", "config.yaml"}, "times, and where the copy lies"


def test_a_damaged_store_and_changed_scores_are_refused(project) -> None:
    with sqlite3.connect(project / "runs" / "tiny" / "labels.db") as store:
        store.execute("UPDATE labels SET score = 1 - score")
    assert "no longer holds the labels that this run made" in refused("run", project / "tiny.yaml")
    (project / "runs" / "tiny" / "labels.db").write_bytes(b"no database" * 1000)
    assert "cannot use the label store" in refused("run", project / "tiny.yaml")


def test_a_stage_with_another_result_makes_later_ones_undone(project) -> None:
    path, folder = project / "tiny.yaml", project / "runs" / "tiny"
    menu = json.loads((folder / "menu.json").read_text())
    ran("menu", path)
    assert ran("run", path).count("done before") == 9, "the same menu again"
    state = json.loads((folder / "run.json").read_text())
    menu["plans"][0]["budget"] *= 0.99
    (folder / "menu.json").write_text(json.dumps(menu))
    state["stages"]["menu"]["files"]["menu.json"] = content_hash(folder / "menu.json")
    (folder / "run.json").write_text(json.dumps(state))
    assert ran("run", path).count("done before") == 1


def test_reading_labels_takes_no_language_model(project, monkeypatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("pipelines.run.model.load_backbone", forbidden)
    for stage in ("tune", "train", "calibrate"):
        ran(stage, project / "tiny.yaml")


def test_a_changed_generation_config_is_said(project, model_folder, tmp_path) -> None:
    """The hub may change it under the same name; here a folder's times are put back, so that no key shows it."""
    facts = json.loads((project / "runs" / "tiny" / "model.json").read_text())
    facts["options"] = {"repetition_penalty": 1.3}
    (project / "runs" / "tiny" / "model.json").write_text(json.dumps(facts))
    assert "was made with the generation config" in refused("features", project / "tiny.yaml")


def test_a_run_follows_the_models_generation_config_and_says_so(project) -> None:
    folder = project / "runs" / "penalised"
    options = ("--set", "name=penalised", "--set", "decoding.options={repetition_penalty: 1.5}")
    said = ran("run", project / "tiny.yaml", *options)
    assert "label.verify steps aside: with repetition_penalty=1.5" in " ".join(said.split())
    assert "repetition_penalty=1.5" in ran("inspect", folder / "allocator")
    certificate = json.loads((folder / "allocator" / "certificate.json").read_text())
    assert certificate["decoding"].endswith("repetition_penalty=1.5")
    with sqlite3.connect(folder / "labels.db") as store:
        ((decoding,),) = store.execute("SELECT DISTINCT decoding FROM labels").fetchall()
    assert decoding.endswith("repetition_penalty=1.5")


def judge_with(project: Path, folder: Path, monkeypatch, module: str, failure: str) -> None:
    """A judge in a module of its own, which fails like this on every thirtieth prompt."""
    (folder / f"{module}.py").write_text(
        f"import sys\n\ndef judge(answer, reference, full):\n    if reference == 'stop':\n        {failure}\n"
        "    return float(answer == full)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    change_prompts(
        project / "prompts.jsonl",
        lambda number, row: row | {"judge": f"{module}:judge", "reference": "x" if number % 30 else "stop"},
    )


def test_a_judge_that_exits_has_failed_on_that_prompt(project, tmp_path, monkeypatch) -> None:
    judge_with(project, tmp_path, monkeypatch, "exiting_judge", "sys.exit(0)")
    said = " ".join(ran("run", project / "tiny.yaml").split())
    assert "labels have no score" in said
    assert "SystemExit: 0" in said
    assert "report.html" in said


def test_a_judge_may_say_anything_in_brackets(project, tmp_path, monkeypatch) -> None:
    """What looks like the terminal's markup is none, in a message and in a folder's name."""
    judge_with(project, tmp_path, monkeypatch, "bracket_judge", "raise ValueError('no [/] and no [/red]')")
    folder = project / "runs [" / "red]"
    for stage in ("menu", "adapt", "label"):
        said = ran(stage, project / "tiny.yaml", "--set", f"runs='{folder}'")
    assert "no [/] and no [/red]" in " ".join(said.split())
    assert "runs [/red]/tiny/labels.db" in said.replace("\n", "")
