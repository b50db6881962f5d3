"""The project as a wheel; as a script it runs the tests against one: `python tests/built_wheel.py [PYTEST OPTIONS]`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"backbone", "controller", "layerbudget", "oracle", "pipelines", "runtime", "serving", "token_exits"}
SOURCES_ONLY = (
    "tests/test_packaging.py",
    "tests/built_wheel.py",
    "tests/test_benchmarks.py",
    "tests/test_docstrings.py",
    "tests/pipelines/test_ray.py",
)
"""About the project's folders, or about scripts that are in no wheel."""


def tracked() -> list[str]:
    """The project's files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def is_packaged(name: str) -> bool:
    """Whether a wheel holds this file; the plugin for vLLM is a distribution of its own."""
    folder = name.split("/")[0]
    is_example = folder == "configs" and name.endswith(".yaml")
    return is_example or (folder in PACKAGES and not name.startswith("serving/vllm/"))


def unpack_wheel(folder: Path, work: Path) -> None:
    """Build a wheel in the folder `work` and unpack it into `folder`."""
    for name in tracked():
        if is_packaged(name) or name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            _copy(name, work / "source")
    build = ["build", "--wheel", "--no-isolation", "--outdir", str(work / "dist"), str(work / "source")]
    subprocess.run([sys.executable, "-m", *build], check=True, capture_output=True)
    (built,) = (work / "dist").iterdir()
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder)


def main(arguments: list[str]) -> int:
    """Runs the tests in a folder that holds a wheel's content and tests whose imports are moved as its own were."""
    sys.path.insert(0, str(ROOT))
    from setup import moved

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "project"
        unpack_wheel(folder, Path(scratch))
        for name in tracked():
            if (not is_packaged(name) or name.startswith("configs/")) and name not in SOURCES_ONLY:
                _copy(name, folder)
                if name.endswith(".py"):
                    (folder / name).write_text(moved((folder / name).read_text()))
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}).returncode


def _copy(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes((ROOT / name).read_bytes())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
