"""What a stranger installs: the right packages, nobody else's names, and commands in the README that exist."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from command import layerbudget as command

ROOT = Path(__file__).parents[1]
PACKAGES = {"backbone", "controller", "layerbudget", "oracle", "pipelines", "runtime"}


def test_no_dependency_owns_one_of_our_names() -> None:
    owners = packages_distributions()
    foreign = {name: owners[name] for name in PACKAGES if set(owners.get(name, ["layerbudget"])) != {"layerbudget"}}
    assert not foreign


def test_a_shadowed_package_is_named(tmp_path) -> None:
    (tmp_path / "controller.py").write_text("")
    code = "import layerbudget; layerbudget.Allocator"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"Python finds {tmp_path.resolve() / 'controller.py'}; rename that module" in done.stderr


def test_importing_layerbudget_is_light() -> None:
    heavy = ("torch", "transformers", "mlflow")
    code = f"import sys, layerbudget, layerbudget.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    import layerbudget

    assert {getattr(layerbudget, name).__name__ for name in layerbudget.__all__} == set(layerbudget.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Alocator'"):
        _ = layerbudget.Alocator


def test_the_version_is_that_of_the_package() -> None:
    import layerbudget

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert layerbudget.__version__ == project["version"]
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"layerbudget {project['version']}\n")


def test_what_users_catch_is_public() -> None:
    import layerbudget

    errors = {name for name in layerbudget.__all__ if name.endswith("Error")}
    assert all(issubclass(getattr(layerbudget, name), layerbudget.InputError) for name in errors)
    raised = {"LoadError", "PlanError", "CacheMismatchError", "WrongModelError", "UnsupportedGenerationError"}
    assert raised | {"InputError", "UnsupportedModelError", "InexactPlanError", "ArtefactError"} <= errors


def test_the_wheel_holds_the_packages_and_nothing_else(tmp_path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    source = tmp_path / "source"
    for name in tracked:
        if name.split("/")[0] in PACKAGES or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    wanted = {name for name in tracked if name.split("/")[0] in PACKAGES}
    assert set(names) == wanted


NOT_IN_CORE = ("datasets", "jinja2", "mapie", "mlflow", "optuna", "pyarrow", "pydantic", "rouge_score", "sklearn")


def test_without_the_pipelines_extra_generation_works_and_stages_say_what_to_install(tmp_path) -> None:
    """As in an environment that has only the core dependencies: the others cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({NOT_IN_CORE}))"
    use = (
        "import layerbudget, runtime.answer_files, controller.models.gbdt, controller.models.mlp; layerbudget.Allocator"
    )
    subprocess.run([sys.executable, "-c", f"{block}; {use}"], check=True, cwd=tmp_path)
    run = "from layerbudget.cli import main; sys.argv = ['layerbudget', 'run', 'x.yaml']; main()"
    done = subprocess.run([sys.executable, "-c", f"{block}; {run}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "is not installed; `pip install 'layerbudget[pipelines]'` brings it" in done.stderr


def test_readme_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^ *make (\w+)", text, re.M)) <= targets
    assert {"demo", "test"} <= set(re.findall(r"^ *make (\w+)", text, re.M))
    from layerbudget.cli import app

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
    assert set(project["optional-dependencies"]) == {"pipelines", "gguf", "demo", "dev"}
