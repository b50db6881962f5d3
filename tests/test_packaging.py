"""What a stranger installs: the right packages, nobody else's names, and commands in the README that exist."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from built_wheel import PACKAGES, is_packaged, tracked, unpack_wheel
from command import layerbudget as command
from tiny import tiny_model, tiny_tokenizer
from tiny_allocator import make_allocator

import layerbudget
from layerbudget.cli import app

ROOT = Path(__file__).parents[1]


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_no_dependency_owns_one_of_our_names() -> None:
    owners = packages_distributions()
    foreign = {name: owners[name] for name in PACKAGES if set(owners.get(name, ["layerbudget"])) != {"layerbudget"}}
    assert not foreign


def test_a_shadowed_package_is_named(tmp_path) -> None:
    (tmp_path / "controller.py").write_text("")
    said = python("import layerbudget; layerbudget.Allocator", tmp_path).stderr
    assert f"Python finds {tmp_path.resolve() / 'controller.py'}; rename that module" in said


def test_importing_layerbudget_is_light() -> None:
    heavy = ("torch", "transformers", "mlflow")
    code = f"import sys, layerbudget, layerbudget.cli; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    assert {getattr(layerbudget, name).__name__ for name in layerbudget.__all__} == set(layerbudget.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Alocator'"):
        _ = layerbudget.Alocator


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    unpack_wheel(folder / "site", folder)
    return folder / "site"


def test_the_wheel_holds_the_packages_under_layerbudget_and_nothing_else(wheel) -> None:
    ours = {name for name in tracked() if is_packaged(name)}
    wanted = {name if name.startswith("layerbudget/") else f"layerbudget/{name}" for name in ours}
    found = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == wanted
    (top,) = wheel.glob("*.dist-info/top_level.txt")
    assert top.read_text().split() == ["layerbudget"]


def test_the_wheel_generates_beside_packages_of_the_same_names(wheel, tmp_path) -> None:
    """In a folder with own `controller/`, `runtime/` and so on, which the script imports as well."""
    own = sorted(PACKAGES - {"layerbudget"})
    for name in own:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    make_allocator(tiny_model("llama")).save_pretrained(tmp_path / "allocator")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(
        f"import {', '.join(own)}\n"
        "from layerbudget import Allocator, load_backbone\n"
        f"assert all(module.MINE for module in ({', '.join(own)}))\n"
        "allocator = Allocator.from_pretrained('allocator')\n"
        "model, tokenizer = load_backbone('model')\n"
        "inputs = tokenizer(['abc', 'hgfe'], return_tensors='pt', padding=True)\n"
        "output = allocator.generate(model, **inputs, max_new_tokens=3)\n"
        "print(tuple(output.shape), Allocator.__module__)\n"
    )
    command = ["run", "--help"], ["inspect", "allocator"], ["init", "--example", "demo"]
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    options: Any = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "script.py"], **options)
    assert done.stdout.split("\n")[0] == "(2, 7) layerbudget.runtime.allocator", done.stderr
    for words in command:
        done = subprocess.run([sys.executable, "-m", "layerbudget", *words], **options)
        assert done.returncode == 0, done.stderr


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert layerbudget.__version__ == project["version"]
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"layerbudget {project['version']}\n")


def test_what_users_catch_is_public() -> None:
    errors = {name for name in layerbudget.__all__ if name.endswith("Error")}
    assert all(issubclass(getattr(layerbudget, name), layerbudget.InputError) for name in errors)
    raised = {"LoadError", "PlanError", "WrongModelError", "UnsupportedGenerationError"}
    assert raised | {"InputError", "UnsupportedModelError", "ArtefactError"} <= errors


EXTRA = ["datasets", "jinja2", "lightgbm", "mapie", "mlflow", "optuna", "pyarrow", "pydantic", "rouge_score", "sklearn"]


def test_without_the_pipelines_extra_generation_works_and_stages_say_what_to_install(tmp_path) -> None:
    """As in an environment that has only the core dependencies: the others cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({EXTRA}))"
    modules = "layerbudget, runtime.answer_files, controller.models.gbdt, controller.models.mlp"
    use = f"import {modules}; layerbudget.Allocator"
    assert python(f"{block}; {use}", tmp_path).returncode == 0
    run = "from layerbudget.cli import main; sys.argv = ['layerbudget', 'run', 'x.yaml']; main()"
    done = python(f"{block}; {run}", tmp_path)
    assert done.returncode == 2
    assert "is not installed; `pip install 'layerbudget[pipelines]'` brings it" in done.stderr


def test_lm_eval_says_which_extra_brings_it(tmp_path) -> None:
    command = "from layerbudget.cli import main; sys.argv = ['layerbudget', 'lm-eval', '--help']; main()"
    code = f"import sys; sys.modules['lm_eval'] = None; {command}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "'lm_eval' is not installed; `pip install 'layerbudget[lm-eval]'` brings it" in done.stderr


def test_readme_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^ *make (\w+)", text, re.M)) <= targets
    assert {"demo", "test"} <= set(re.findall(r"^ *make (\w+)", text, re.M))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    used = set(re.findall(r"^    layerbudget (\w+) ", text, re.M))
    assert {"run", "inspect", "generate"} <= used <= commands
    for path in re.findall(r"(?:configs|docs|examples|benchmarks)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path


def test_readme_python_runs_as_far_as_names_go() -> None:
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        compile(block, "README.md", "exec")


def test_extras_are_those_the_code_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == {"pipelines", "ray", "serve", "gguf", "lm-eval", "demo", "dev"}


def test_prompts_become_tokens_in_one_place() -> None:
    """A call of the tokenizer elsewhere would double the beginning token, or leave a marked text out."""
    call = re.compile(r"\b_?tokenizer\(")
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if call.search(line) and "def " not in line and "reference" not in line
    }
    elsewhere = {line for line in found if not line.startswith(("oracle/chat.py", "backbone/loading.py"))}
    assert elsewhere == {
        "oracle/answered_prompts.py: ids = tokenizer(text, add_special_tokens=False).input_ids",  # of a reference
        'serving/local.py: tokenizer("a")',  # a first call, of which nothing is used
    }
