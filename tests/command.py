"""The command line as `main` runs it, in this process: a new one spends seconds on imports."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from layerbudget.cli import main


def layerbudget(*arguments) -> subprocess.CompletedProcess[str]:
    """What the command prints, and its exit status."""
    command, code = ["layerbudget", *map(str, arguments)], 0
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        patch.object(sys, "argv", command),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    assert isinstance(code, int), code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def ran(*arguments) -> str:
    """What a command prints that must end with status 0."""
    done = layerbudget(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(*arguments) -> str:
    """The one sentence of a command that must end with status 2."""
    done = layerbudget(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
