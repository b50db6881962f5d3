"""Wheels carry all packages under `layerbudget`, so that a user's own `controller/` or `runtime/` is in nobody's way.

In the project, and installed as editable, they stand beside each other under their own names. All settings are in
pyproject.toml; this file adds what a wheel needs: other places, and imports that name them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MOVED = ("backbone", "controller", "oracle", "pipelines", "runtime", "serving", "token_exits")
EXAMPLES = "layerbudget.configs"
"""Where `layerbudget init --example` finds the configurations, which stand in `configs/` in the project."""
OURS = re.compile(rf"({'|'.join(MOVED)})((?:\.\w+)*)(:\w+)?")


def moved(source: str) -> str:
    """Python source with every import of our packages, and every text that names one of our modules, under
    `layerbudget`.

    Raises:
        ValueError: an import that cannot be moved, such as `import oracle.prompts`, which binds the name `oracle`.
    """
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    places: list[tuple[int, int]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(OURS.fullmatch(alias.name) for alias in node.names):
            raise ValueError(f"line {node.lineno}: write `from package import name` instead of `import package.name`")
        if isinstance(node, ast.ImportFrom) and not node.level and OURS.fullmatch(node.module or ""):
            places.append((node.lineno, node.col_offset + len("from ")))
        if isinstance(node, ast.Constant) and _names_a_module(node.value):
            places.append((node.lineno, node.col_offset + 1))
    for line, column in sorted(places, reverse=True):
        content = lines[line - 1]
        lines[line - 1] = content[:column] + b"layerbudget." + content[column:]
    return b"".join(lines).decode()


def _names_a_module(value: object) -> bool:
    """Whether a constant is a text such as `backbone.plan` or `controller.base:Controller`; not `controller.json`."""
    match = OURS.fullmatch(value) if isinstance(value, str) else None
    if match is None or not match[2]:
        return False
    path = ROOT / match[1] / match[2].split(".")[1]
    return path.with_suffix(".py").is_file() or path.is_dir()


class Wheel(bdist_wheel):
    """Puts the packages under `layerbudget` before anything is built."""

    def run(self) -> None:
        packages = [name for name in self.distribution.packages if name.partition(".")[0] in MOVED]
        new = {f"layerbudget.{name}": name for name in packages}
        new[EXAMPLES] = "configs"
        self.distribution.packages = ["layerbudget", *new]
        self.distribution.package_dir = {name: old.replace(".", "/") for name, old in new.items()}
        self.distribution.package_data = {
            f"layerbudget.{name}" if name in packages else name: files
            for name, files in self.distribution.package_data.items()
        } | {EXAMPLES: ["*.yaml"]}
        super().run()


class Modules(build_py):
    """Moves the imports of what it copies."""

    def build_module(self, module: Any, module_file: str, package: Any) -> Any:
        done = super().build_module(module, module_file, package)
        if self.distribution.package_dir:
            target = Path(self.get_module_outfile(self.build_lib, self._parts(package), module))
            target.write_text(moved(target.read_text(encoding="utf-8")), encoding="utf-8")
        return done

    @staticmethod
    def _parts(package: Any) -> list[str]:
        return package.split(".") if isinstance(package, str) else list(package)


if __name__ == "__main__":
    setup(cmdclass={"bdist_wheel": Wheel, "build_py": Modules})
