"""`layerbudget init`, `layerbudget try`, and a user's first mistakes."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from command import layerbudget, refused
from markupsafe import escape

DRAW = random.Random(0)
TEXTS = ["".join(DRAW.choices("abcdefgh", k=DRAW.randint(5, 20))) for _ in range(120)]
TURNS = [{"role": "user", "content": "abc"}]


@pytest.fixture
def project(tmp_path, monkeypatch, give_store):
    """An empty folder to work in, whose database of MLflow is there."""
    give_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_csv(path: Path, delimiter: str = ",", header=("id", "question", "answer"), count: int = 120) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(header)
        table.writerows([number, text, text[:1]][: len(header)] for number, text in enumerate(TEXTS[:count]))
    return path


def write_jsonl(path: Path, change=lambda number, row: row) -> Path:
    rows = [{"id": number, "prompt": text, "reference": text[:1]} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(change(number, row)) + "\n" for number, row in enumerate(rows)))
    return path


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_init_takes_a_csv_as_it_is(project, model_folder, delimiter) -> None:
    write_csv(project / "my prompts.csv", delimiter)
    done = layerbudget("init", model_folder, "my prompts.csv")
    assert done.returncode == 0, done.stderr
    assert "menu.method" in done.stdout
    assert "answers are short" in done.stdout
    assert yaml.safe_load(Path("my-prompts.yaml").read_text())["data"]["columns"] == {
        "prompt": "question",
        "reference": "answer",
    }
    checked = layerbudget("check", "my-prompts.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "120 of 1 kinds, judged by exact" in checked.stdout
    assert "my-prompts.yaml is there already; name another" in refused("init", model_folder, "my prompts.csv")
    assert layerbudget("init", model_folder, "my prompts.csv", "--overwrite").returncode == 0


def test_init_asks_the_model_where_there_are_no_references(project, model_folder) -> None:
    write_csv(project / "bare.csv", header=("nr", "frage"))
    done = layerbudget("init", model_folder, "bare.csv", "--column", "prompt=frage", "--out", "x.yaml")
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load(Path("x.yaml").read_text())
    assert written["name"] == "x"
    assert written["data"]["judge"] == "agreement"
    assert "of the model's own answers" in Path("x.yaml").read_text()
    assert layerbudget("check", "x.yaml").returncode == 0


def test_init_writes_every_example(project) -> None:
    said = refused("init", "--example", "nothing")
    names = said.split("there are ")[1].split(", ")
    assert {"demo", "gemma_mixed"} <= {*names}
    for name in names:
        assert layerbudget("init", "--example", name).returncode == 0
        assert f"configs/{name}.yaml" in Path(f"{name}.yaml").read_text()


def _no_weights(folder: Path, model_folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _hybrid(folder: Path, model_folder: Path) -> Path:
    shutil.copytree(model_folder, folder / "hybrid")
    config = json.loads((folder / "hybrid" / "config.json").read_text())
    kinds = ["linear_attention", "full_attention"] * 3
    (folder / "hybrid" / "config.json").write_text(
        json.dumps({**config, "model_type": "qwen3_next", "layer_types": kinds})
    )
    return folder / "hybrid"


def _same(folder: Path, model_folder: Path) -> Path:
    return model_folder


MISTAKES = {
    "wrong column": (
        lambda path: write_csv(path.with_suffix(".csv"), header=("nr", "frage", "antwort")),
        _same,
        "no column 'prompt' or 'messages'; it has nr, frage, antwort: set data.columns, or give `layerbudget init` "
        "--column FIELD=NAME",
    ),
    "ids twice": (
        lambda path: write_jsonl(path, lambda number, row: {**row, "id": number // 2}),
        _same,
        "the id '0' was used before, at line 1; ids must differ",
    ),
    "unknown judge": (
        lambda path: write_jsonl(path, lambda number, row: {**row, "judge": "exat"}),
        _same,
        "unknown judge 'exat'; did you mean 'exact'?",
    ),
    "missing reference": (
        lambda path: write_jsonl(path, lambda number, row: {**row, "reference": None if number == 7 else "a"}),
        _same,
        "line 8: the reference is missing, and the judge 'exact' needs one; add it, or take 'agreement'",
    ),
    "wrong folder": (
        write_jsonl,
        _no_weights,
        "there is no config.json; name the folder that save_pretrained wrote",
    ),
    "no file": (lambda path: path, _same, "no prompts file"),
    "too few prompts": (
        lambda path: write_csv(path.with_suffix(".csv"), ";", count=20),
        _same,
        "holds 20 prompts, and a run needs 64 at least for its five splits: add prompts",
    ),
    "no template": (
        lambda path: write_jsonl(path, lambda number, row: {"id": number, "messages": TURNS, "reference": "a"}),
        _same,
        "has no chat template: give prompt, a text, or a model for conversations",
    ),
    "hybrid model": (write_jsonl, _hybrid, "qwen3_next is not made of attention layers alone"),
}


@pytest.mark.parametrize("command", ["init", "try"])
@pytest.mark.parametrize("name", MISTAKES)
def test_first_mistakes_are_one_sentence(name, command, project, model_folder) -> None:
    make_prompts, make_model, sentence = MISTAKES[name]
    prompts, model = make_prompts(project / "prompts.jsonl"), make_model(project, model_folder)
    before = {path.name for path in project.iterdir()}
    assert sentence in refused(command, model, prompts)
    assert {path.name for path in project.iterdir()} == before, "nothing is written"


def test_check_warns_where_nothing_ends_an_answer(project, model_folder) -> None:
    write_csv(project / "p.csv", ";")
    assert layerbudget("init", model_folder, "p.csv").returncode == 0
    assert "set decoding.stop" not in layerbudget("check", "p.yaml").stdout
    assert "set decoding.stop, such as" in layerbudget("check", "p.yaml", "--set", "decoding.stop=[]").stdout


@pytest.mark.parametrize("held", ["mine", "data: [1]"])
def test_try_refuses_a_folder_of_somebody_else(held, project, model_folder) -> None:
    write_csv(project / "p.csv", ";")
    assert layerbudget("init", model_folder, "p.csv").returncode == 0
    Path("runs/p").mkdir(parents=True)
    Path("runs/p/config.yaml").write_text(held)
    assert "runs/p holds 'config.yaml', but no run" in refused("try", model_folder, "p.csv")
    assert Path("runs/p/config.yaml").read_text() == held


def test_try_ends_in_a_verdict_and_run_goes_on(project, model_folder) -> None:
    write_csv(project / "p.csv", ";")
    done = layerbudget("try", model_folder, "p.csv", "--minutes", "9")
    assert done.returncode == 0, done.stderr
    found = json.loads((project / "runs/p/verdict.json").read_text())
    assert found["reason"] in ("score_too_low", "too_few_prompts"), "random weights, 120 prompts"
    assert " ".join(found["sentences"]) in " ".join(done.stdout.split())
    page = (project / "runs/p/report.html").read_text()
    assert escape(found["sentences"][0]) in page, "the report has the same verdict"
    assert page.count("<svg") == 8, "with speeds against quality"
    assert "for 9 minutes: data.limit=120" in " ".join(done.stdout.split())
    trial, full = (yaml.safe_load(Path(name).read_text()) for name in ("runs/p/config.yaml", "p.yaml"))
    assert "limit" not in full["data"]
    assert trial["data"]["limit"] == 120
    assert "prompts fit into" in refused("try", model_folder, "p.csv", "--minutes", "1")
    assert layerbudget("menu", "p.yaml").returncode == 0, "the folder is the full run's"
    assert "holds a run with all prompts" in refused("try", model_folder, "p.csv", "--minutes", "9")
    assert "p.yaml is there for the prompts p.csv, not q.csv" in refused(
        "try", model_folder, "q.csv", "--out", "p.yaml"
    )
